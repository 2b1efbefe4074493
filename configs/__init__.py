"""Hydra configuration groups and their resolvers.

Import this package before composing its groups in another application.
"""

from omegaconf import OmegaConf

from fitsmall.experiments.run.fingerprint import digest, fingerprint

# For a learning rate that depends on a width.
OmegaConf.register_new_resolver("divide", lambda a, b: a / b, replace=True)
# For an id that stays the same when a run resumes in its folder.
OmegaConf.register_new_resolver("digest", digest, replace=True)
# For the folder of a job: a sweep that starts again finds the jobs that have finished.
OmegaConf.register_new_resolver("fingerprint", lambda *, _root_: fingerprint(_root_), replace=True)
