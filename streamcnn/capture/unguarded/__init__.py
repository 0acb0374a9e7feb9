"""A forward pass run on fake tensors, at each call anew: code that Dynamo cannot follow."""
