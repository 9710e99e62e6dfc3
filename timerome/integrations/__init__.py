"""Edits inside other people's tools. Nothing here is imported by the rest, and no tool has to be installed."""
