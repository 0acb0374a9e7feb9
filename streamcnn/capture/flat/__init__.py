"""A captured graph as one flat list of calls, in which none overwrites a tensor."""
