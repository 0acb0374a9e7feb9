"""A forward pass as Dynamo follows it, used again for as long as its guards hold."""
