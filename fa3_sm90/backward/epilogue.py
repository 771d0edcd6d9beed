"""dK and dV of a warpgroup on their way out: over its rows of K and V in shared memory, by TMA."""

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.registers import narrow
from cute_fa.device.tma_boxes import BoxCopy, tile_layout
from fa3_sm90.backward.arguments import Boxes, TmaTensors
from fa3_sm90.backward.config import CONSUMERS, Fa3BackwardConfig
from fa3_sm90.backward.consumer import CONSUMER_BARRIER
from fa3_sm90.backward.products import Products
from fa3_sm90.backward.storage import Storage
from fa3_sm90.backward.work import KeyWork
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M


class Epilogue:
    """By one consumer warpgroup, of its 64 keys."""

    def __init__(self, config: Fa3BackwardConfig, tma: TmaTensors, storage: Storage, index: Int32, thread: Int32):
        self.config, self.tma, self.storage, self.index, self.thread = config, tma, storage, index, thread
        self.boxes = Boxes.of(config)

    @cute.jit
    def store(self, products: Products, work: KeyWork, scale: Float32):
        """dK times ``scale``, and dV. Rows behind the sequence's are not written."""
        c, to_smem, to_global = self.config, self.to_smem, self.to_global
        products.acc_dk.store(products.acc_dk.load() * scale)
        # every warpgroup's dQ has read all of K
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=WARPGROUP * CONSUMERS)
        to_smem(products.acc_dv, products.mma_dv, self.storage.v, c.head_dim_v_padded)
        to_smem(products.acc_dk, products.mma_dk, self.storage.k, c.head_dim_padded)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=CONSUMER_BARRIER, number_of_threads=WARPGROUP * CONSUMERS)
        if self.thread < 32:
            to_global("dv", self.storage.v, c.head_dim_v_padded, work)
            to_global("dk", self.storage.k, c.head_dim_padded, work)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def to_smem(self, acc: cute.Tensor, mma: cute.TiledMma, pointer: cute.Pointer, columns: int):
        """The warpgroup's rows in the input's dtype."""
        c, dtype = self.config, CUTE_DTYPE[self.config.dtype]
        layout = tile_layout(dtype, c.tile_n, columns, 1)
        tile = cute.make_tensor(pointer, layout.outer)[None, None, 0]
        narrowed = cute.make_rmem_tensor_like(acc, dtype)
        narrow(acc, narrowed)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), dtype)
        copy = cute.make_tiled_copy_C(atom, mma).get_slice(self.thread)
        target = cute.local_tile(tile, (WGMMA_M, columns), (self.index, 0))
        cute.copy(copy, copy.retile(narrowed), copy.partition_D(target))

    def to_global(self, name: str, pointer: cute.Pointer, columns: int, work: KeyWork):
        """Start the store, by one warp."""
        c, box = self.config, getattr(self.boxes, name)
        outer = () if const_expr(c.cu_seqlens_k) else (work.batch,)
        first = work.first_key(c) + self.index * WGMMA_M
        copy = BoxCopy(getattr(self.tma, name), box, c.tile_n, work.head_kv, outer)
        with cute.arch.elect_one():
            tile = pointer + self.index * (WGMMA_M * box.columns)
            copy.store(tile, work.info.offset_k + first, work.rows_k - first)
