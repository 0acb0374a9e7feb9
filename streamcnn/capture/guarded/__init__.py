"""A forward pass captured by Dynamo, and reused for as long as its guards hold."""
