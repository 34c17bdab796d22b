"""How programs are made, kept and entered; the ground on which the rest stands.

`programs` keeps them, in the process and on disk; `precision` enters float64 and JAX's cache; `memory` aligns
and counts; `digest` and `loaded` say what code and data are; `private` guards the folder.
"""
