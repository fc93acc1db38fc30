"""The version of what clients and migd say to each other."""

PROTOCOL = 1
