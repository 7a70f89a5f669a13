"""Frameworks, each in one import: `aiodcp.integrations.lightning` and so on, which needs the extra of its name.

Each is a thin layer over the public calls: what it does can be done by hand, and the cookbook says how.
"""
