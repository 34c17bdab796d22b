"""How programs are made, kept and entered; the ground on which the rest stands.

Functions that compute are decorated by `entry.entry`. `programs` keeps what they compile, in the process and on disk;
`precision` has float64, JAX's settings and its cache; `devices` where programs run; `memory` aligns and counts;
`digest` and `loaded` say what code and data are; `private` guards the folder.
"""
