"""All studies by name. Only whole ones are here."""

from __future__ import annotations

from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab import (
    study_bprr,
    study_chains,
    study_churn,
    study_exactness,
    study_failures,
    study_helix,
    study_realism,
    study_ring,
    study_wan,
)
from shoal.lab.study import Study

_CHAINS: Final = "server chain composition (Sun, He, Hou, arXiv 2604.14993)"
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
            title="BLOOM-176B on 9 and 26 servers scattered over AboveNet and BellCanada",
            source=f"{_BPRR}, table VI",
            run=study_bprr.scattered,
            seeds=60,
            quick_seeds=40,
            takes=("map",),
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
            seeds=20,
            quick_seeds=3,
        ),
        Study(
            name="chains",
            title="BLOOM-176B on 10 to 40 slices under load: Petals, BPRR, composed chains",
            source=f"{_CHAINS}, its simulated setting",
            run=study_chains.chains,
            seeds=10,
            quick_seeds=3,
        ),
        Study(
            name="dispatch",
            title="Petals' placement with its own router, and with a dispatcher",
            source=f"{_CHAINS}; the comparison is ours",
            run=study_chains.dispatch,
            seeds=30,
            quick_seeds=30,
        ),
        Study(
            name="backoff",
            title="What it costs that clients ask again instead of being told",
            source=f"{_CHAINS}; the comparison is ours",
            run=study_chains.backoff,
            seeds=8,
            quick_seeds=2,
        ),
        Study(
            name="failures",
            title="Servers that die while they answer, on the real client and server",
            source="Petals (Borzunov et al. 2023, arXiv 2312.08361), its table on failures",
            run=study_failures.failures,
            seeds=6,
            quick_seeds=2,
        ),
        Study(
            name="wan",
            title="Near and far networks: the client carries between servers, or they push",
            source="Petals (Borzunov et al. 2023, arXiv 2312.08361), its table of networks",
            run=study_wan.wan,
            seeds=1,
            quick_seeds=1,
        ),
        Study(
            name="helix",
            title="Placements for throughput on 24 machines of three kinds",
            source="Helix (Mei et al., ASPLOS'25, arXiv 2406.01566), one cluster and three",
            run=study_helix.helix,
            seeds=20,
            quick_seeds=5,
        ),
        Study(
            name="realism",
            title="BPRR's gain with slower links, unknown lengths of answers, and bursts",
            source=f"{_BPRR}, its testbeds; the changes are ours",
            run=study_realism.realism,
            seeds=30,
            quick_seeds=5,
            takes=("rtts", "requests"),
        ),
        Study(
            name="ring",
            title="A ring of small nodes: tokens per second by nodes and samples, uneven nodes",
            source="MDI-LLM (Macario et al., arXiv 2505.18164), its boards; nodes are simulated",
            run=study_ring.ring,
            seeds=1,
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
