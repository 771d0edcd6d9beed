"""The FA3 forward in fp8 as it would be without promotion: wgmma adds every block to one and the same accumulator."""

from dataclasses import fields
from typing import ClassVar

import cutlass.cute as cute

from cute_fa.device.tile_work import dense_extents
from fa3_sm90.forward import kernel
from fa3_sm90.forward.accumulation import Direct
from fa3_sm90.forward.config import WARPGROUP, Fa3ForwardConfig
from fa3_sm90.forward.consumer import Consumer


class UnpromotedConfig(Fa3ForwardConfig):
    """A class of its own, by which the caches tell its kernels from the others."""

    kernel_module: ClassVar[str] = "tests.testing.unpromoted"

    @classmethod
    def like(cls, config: Fa3ForwardConfig) -> "UnpromotedConfig":
        """The same tiles, all columns of O at a time."""
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        return cls(**values | {"promoted_columns": None})


class UnpromotedConsumer(Consumer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.products.from_zero = False
        self.accumulation = Direct(self.products)


class UnpromotedKernel(kernel.Fa3ForwardKernel):
    def consume(self, args, tma, storage, pipelines):
        tidx, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(tidx // WARPGROUP) - 1
        UnpromotedConsumer(
            self.config, args, tma, dense_extents(args.common), storage, pipelines, index, tidx % WARPGROUP
        ).run()


def build(config: UnpromotedConfig):
    promoted, arguments = kernel.build(config)
    return UnpromotedKernel(promoted.config), arguments
