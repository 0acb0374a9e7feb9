"""Kinds of methods: how each comes from a large image to a class, one kind a file."""
