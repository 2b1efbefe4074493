"""Sweepers for Hydra, which are installed as ``hydra_plugins.fitsmall``.

Hydra imports every module of that package for every command, so none of them imports torch before
it runs.
"""
