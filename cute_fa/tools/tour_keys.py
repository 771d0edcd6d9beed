"""The kernels of the tour's layers on a GPU of an architecture, at full length, forward and backward, as lines for
``python -m cute_fa bundle --keys``: ``python -m cute_fa.tools.tour_keys --arch sm_90a >> FILE``. Runs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cute_fa.engine.recording import line_of
from cute_fa.engine.table import TABLE
from cute_fa.semantics.types import Direction, SmArch
from cute_fa.tools.tour import layers_of
from cute_fa.tools.trial import problem_of_spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cute_fa.engine.contract import KernelConfig


_TRAINED = Direction.FORWARD, Direction.BACKWARD


def tour_configs(arch: SmArch, directions: Iterable[Direction] = _TRAINED) -> list[KernelConfig]:
    """Each kernel once. ALiBi's slopes are a formula and have no gradient, fp8 has none at all."""
    configs: dict[KernelConfig, None] = {}
    for layer in layers_of(arch):
        for direction in directions:
            if layer.dtype.is_fp8 and direction is Direction.BACKWARD:
                continue
            problem = problem_of_spec(layer.spec(layer.length), arch, direction=direction)
            configs[TABLE.lookup(problem).configure(problem)] = None
    return list(configs)


@click.command()
@click.option("--arch", type=click.Choice([arch.value for arch in SmArch]), required=True)
def main(arch: str) -> None:
    for config in tour_configs(SmArch(arch)):
        click.echo(line_of(config))


if __name__ == "__main__":
    main()
