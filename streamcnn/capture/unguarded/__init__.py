"""Capture by running on fake tensors, anew at each call, for code that Dynamo cannot follow."""
