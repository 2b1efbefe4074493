"""A sweeper that searches for the best trade-offs, by Optuna. A stopped search continues."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra_plugins.fitsmall.jobs import JobSweeper

from fitsmall.experiments.run.folder import read_result

__all__ = ["Search"]


class Search(JobSweeper):
    """Run trials that Optuna proposes from the results of earlier ones.

    It minimises all objectives, and prints the trials on their Pareto front.

    Args:
        params: Values to search, by key, as on the command line: ``interval(0.5, 0.99)``, or
            ``tag(log, interval(1, 100))`` on a logarithmic scale; ``range(2, 9)``; ``choice(a, b)``
            or ``a,b``.
        objectives: Names of numbers in ``result.json``.
        trials: Number of trials, including those of an interrupted search.
        parallel: Trials to propose together, for a launcher that runs several at once.
        seed: Seed of the proposals.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        objectives: Sequence[str] = ("error_validation", "bytes"),
        trials: int = 30,
        parallel: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.params, self.objectives = dict(params or {}), list(objectives)
        self.trials, self.parallel, self.seed = trials, parallel, seed

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError as error:
            from fitsmall.compressors.extras import install_command  # imports torch

            raise ImportError(f"{error}: {install_command('sweep')}") from error

        folder = self.open_folder()
        overrides = self.parse_overrides([f"{k}={v}" for k, v in self.params.items()] + arguments)
        if not any(override.is_sweep_override() for override in overrides):
            raise HydraException(
                "nothing to search: give an interval, as in "
                "'callbacks.prune.sparsity=interval(0.5,0.99)'"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        log = JournalFileBackend(str(folder / "search.log"))
        study = optuna.create_study(
            study_name="search",
            storage=JournalStorage(log),
            directions=["minimize"] * len(self.objectives),
            load_if_exists=True,
        )
        self._check_same_search(study, folder, overrides)
        # A new seed for each continuation, or it would begin with the same proposals.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        states = optuna.trial.TrialState
        for stopped in study.get_trials(states=(states.RUNNING,)):
            # Its values are proposed again, and its run resumes.
            study.enqueue_trial(stopped.params)
            study.tell(stopped.number, state=states.FAIL)
        count = len(study.get_trials(states=(states.COMPLETE,)))
        print(f"{self.trials} trials in {folder}, {count} of them finished before")
        returns: list[Sequence[JobReturn]] = []
        while count < self.trials:
            asked = [study.ask() for _ in range(min(self.parallel, self.trials - count))]
            jobs = [
                self.make_job([_propose(override, trial) for override in overrides], trial.number)
                for trial in asked
            ]
            returns.append(self.run_jobs(jobs, asked[0].number))
            for trial, job in zip(asked, jobs, strict=True):
                path = job.folder / "result.json"
                result = read_result(path) if path.is_file() else {}
                if result.get("fingerprint") == job.fingerprint:
                    study.tell(trial, self._values(result))
                else:
                    study.tell(trial, state=states.FAIL)
            count += len(asked)
        for best in sorted(study.best_trials, key=lambda trial: trial.values):
            values = ", ".join(f"{value:.4g}" for value in best.values)
            print(f"{values}: {' '.join(f'{k}={v}' for k, v in best.params.items())}")
        return returns

    def _check_same_search(self, study: Any, folder: Path, overrides: Sequence[Override]) -> None:
        """Refuse to continue a search with other objectives, intervals or settings."""
        fixed = [_fixed(o) for o in overrides if not o.is_sweep_override()]
        search = {
            "objectives": self.objectives,
            "searched": sorted(str(o.input_line) for o in overrides if o.is_sweep_override()),
            "settings": self.make_job(fixed, 0).fingerprint,  # the same in all trials
        }
        before = study.user_attrs.get("search", search)
        if before != search:
            raise HydraException(
                f"{folder} holds a search with other settings, for the objectives "
                f"{', '.join(before['objectives'])}: repeat its settings to continue it, or choose "
                "another hydra.sweep.dir"
            )
        study.set_user_attr("search", search)

    def _values(self, result: dict[str, Any]) -> list[float]:
        for name in self.objectives:
            if not isinstance(result.get(name), int | float):
                numbers = (key for key, value in result.items() if isinstance(value, int | float))
                raise HydraException(
                    f"objectives: {name} is not a number in result.json; it has "
                    f"{', '.join(numbers)}"
                )
        return [float(result[name]) for name in self.objectives]


def _propose(override: Override, trial: Any) -> str:
    """The override with the value that a trial proposes, or as it is if it has only one."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, ChoiceSweep):
        chosen = trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    elif isinstance(value, RangeSweep):
        first, *_, last = [*value.range()] * 2  # twice, since a range may have only one value
        chosen = _suggest_number(trial, first, last)(key, first, last, step=value.step)
    elif isinstance(value, IntervalSweep):
        first, last = value.start, value.end
        is_log = "log" in value.tags
        chosen = _suggest_number(trial, first, last)(key, first, last, log=is_log)
    else:
        return _fixed(override)
    return f"{key}={chosen}"


def _fixed(override: Override) -> str:
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _suggest_number(trial: Any, first: Any, last: Any) -> Callable[..., Any]:
    """The trial's method for integers if both ends are integers, else that for floats."""
    are_ints = isinstance(first, int) and isinstance(last, int)
    suggest: Callable[..., Any] = trial.suggest_int if are_ints else trial.suggest_float
    return suggest
