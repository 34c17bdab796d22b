"""H = Lambda' Z' W Z Lambda + I: its pattern, its factor and what is asked of it. Nothing here knows statistics.

`symbolic` plans the elimination of a design's blocks once, on the host; `linalg` eliminates, solves and takes log
determinants inside programs; `bordered` adds the fixed effects' rows and columns.
"""
