"""The node testbed: hosts made of namespaces over one Debian image.

Standard library only, Python >= 3.11.
"""
