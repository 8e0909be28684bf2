"""Adapters for other people's frameworks; each module needs the framework it is named after."""
