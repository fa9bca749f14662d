"""All studies by name. Only whole ones are here."""

from __future__ import annotations

from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab import study_bprr, study_churn, study_exactness
from shoal.lab.study import Study

_BPRR: Final = "BPRR (Sun, He, Ji, Parag, arXiv 2512.21884)"

STUDIES: Final[dict[str, Study]] = {
    study.name: study
    for study in (
        Study(
            name="bprr-clustered",
            title="BLOOM-176B on 9 servers in two clusters: Petals and CG-BP with WS-RR",
            source=f"{_BPRR}, table III",
            run=study_bprr.clustered,
            seeds=20,
            quick_seeds=3,
        ),
        Study(
            name="bprr-scattered",
            title="The same on 9 and 26 servers scattered over AboveNet and BellCanada",
            source=f"{_BPRR}, table VI",
            run=study_bprr.scattered,
            seeds=60,
            quick_seeds=40,
        ),
        Study(
            name="bprr-ablation",
            title="What carries BPRR's gain: order of joining, numbers of blocks, or routes",
            source=f"{_BPRR}, ablation",
            run=study_bprr.ablation,
            seeds=30,
            quick_seeds=10,
        ),
        Study(
            name="exactness",
            title="How far quick rules of placement are from the optimum",
            source=f"{_BPRR}, its program and example; cases of our own",
            run=study_exactness.exactness,
            seeds=5,
            quick_seeds=3,
        ),
        Study(
            name="churn",
            title="Servers that come and go: Petals' rule against rules for response time",
            source="Borisov, block allocation for inference latency (master thesis, HSE 2024)",
            run=study_churn.churn,
            seeds=10,
            quick_seeds=3,
        ),
    )
}


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STUDIES:
        raise ConfigError(f"no study is called {name!r} (choose {', '.join(STUDIES)})")
    return STUDIES[name]
