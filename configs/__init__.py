"""Hydra configuration groups, and the resolvers that they use: whoever composes with them, in an
application of their own as well, imports this package."""

from omegaconf import OmegaConf

from fitsmall.experiments.run.fingerprint import digest, fingerprint

# A learning rate from a width.
OmegaConf.register_new_resolver("divide", lambda a, b: a / b, replace=True)
# For what shall be the same whenever a run goes on in its folder.
OmegaConf.register_new_resolver("digest", digest, replace=True)
# As the name of a job's directory: a sweep that is started again finds what it has done.
OmegaConf.register_new_resolver("fingerprint", lambda *, _root_: fingerprint(_root_), replace=True)
