"""What measures an artifact on any device: standard library, numpy, and the runtime found there.

These files are sent over SSH and lie in every bundle, so they import nothing of fofa_deploy but each other; `measure` and
`environment` take their timing loop and their facts from here.
"""
