"""O and LSE of a warpgroup on their way out: LSE from registers, O through shared memory by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from cute_fa.device.dtypes import CUTE_DTYPE
from cute_fa.device.forward_arguments import Boxes, ForwardArguments, TmaTensors
from cute_fa.device.fragments import warpgroup_rows_and_columns
from cute_fa.device.registers import narrow, opaque
from cute_fa.device.ring import Ring, RingState
from cute_fa.device.tile_work import TileWork
from cute_fa.device.tma_boxes import BoxCopy, tile_layout
from fa3_sm90.common.wgmma import WARPGROUP, WGMMA_M
from fa3_sm90.forward.cluster import place_of
from fa3_sm90.forward.config import Fa3ForwardConfig
from fa3_sm90.forward.products import Products
from fa3_sm90.forward.rows import ROWS, Rows
from fa3_sm90.forward.storage import Storage
from fa3_sm90.forward.turns import FIRST_TURN_BARRIER


class Epilogue:
    """Each warpgroup stores its own rows and waits for no other. The store runs on behind the next tile."""

    def __init__(
        self,
        config: Fa3ForwardConfig,
        args: ForwardArguments,
        tma: TmaTensors,
        storage: Storage,
        products: Products,
        rows: Rows,
        queries: Ring,
        index: Int32,
        thread: Int32,
    ):
        c = config
        self.config, self.args, self.tma, self.rows = c, args, tma, rows
        self.queries, self.index, self.thread = queries, index, thread
        self.boxes, self.dtype = Boxes.of(c), CUTE_DTYPE[c.out_dtype]
        self.out, self.mma = storage.out[0], products.mma_output

    @cute.jit
    def store(self, acc_o: cute.Tensor, lse: cute.Tensor, work: TileWork, queries: RingState):
        """Write the tile's rows; ``queries``: state of its Q, which is released here where O takes its place."""
        c = self.config
        first_token = work.first_token + place_of(c, self.index) * c.tokens
        self.store_lse(lse, work, first_token)
        leader = self.thread < 32
        if const_expr(c.own_output):
            if leader:  # the previous tile's store has read the memory
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        # All four warps: a warp's wait for its products says nothing of the others', which may still read Q.
        self.sync()
        self.to_smem(acc_o, work, first_token)
        cute.arch.fence_proxy("async.shared", space="cta")
        self.sync()
        to_global = self.to_global
        if leader and first_token < work.info.rows_q:
            to_global(work, first_token)
        if const_expr(not c.own_output):
            if leader:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.queries.release(queries.stage)

    def to_global(self, work: TileWork, first_token: Int32):
        """Start the store, by one warp."""
        c = self.config
        outer = () if const_expr(c.cu_seqlens_q) else (work.tile.batch,)
        copy = BoxCopy(self.tma.out, self.boxes.out, WGMMA_M, work.tile.head * c.pack_gqa, outer)
        with cute.arch.elect_one():
            copy.store(self.tile().iterator, work.info.offset_q + first_token, work.info.rows_q - first_token)
            cute.arch.cp_async_bulk_commit_group()

    def finish(self):
        """Shared memory must outlive the stores that read it; where O takes the place of Q, every tile has waited."""
        if const_expr(self.config.own_output):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def sync(self):
        """Among the warpgroup's threads."""
        barrier = FIRST_TURN_BARRIER + self.config.warpgroups + self.index
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)

    @cute.jit
    def store_lse(self, lse: cute.Tensor, work: TileWork, first_token: Int32):
        """Rows that do not count get −inf."""
        target, info = self.args.common.lse, work.info
        for r in cutlass.range_constexpr(ROWS):
            token = first_token + self.rows.tokens[r]
            head = work.tile.head * self.config.pack_gqa + self.rows.heads[r]
            if self.rows.column == 0 and self.rows.exists(r) and token < info.rows_q:
                value = lse[r] if token < info.seqlen_q else -Float32.inf
                if const_expr(self.config.cu_seqlens_q):
                    target[head, info.offset_q + token] = value
                else:
                    target[work.tile.batch, head, token] = value

    @cute.jit
    def to_smem(self, acc_o: cute.Tensor, work: TileWork, first_token: Int32):
        """O in the output's dtype; rows that do not count become 0."""
        rows = self.rows
        matrix = warpgroup_rows_and_columns(acc_o)
        for r in cutlass.range_constexpr(ROWS):
            row = matrix[r, None]
            if first_token + rows.tokens[r] >= work.info.seqlen_q:
                row.fill(0.0)
        rO = cute.make_rmem_tensor_like(acc_o, self.dtype)
        narrow(acc_o, rO)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        # opaque, so that the addresses are computed here and not kept in registers over the main loop
        copy = cute.make_tiled_copy_C(atom, self.mma).get_slice(opaque(self.thread))
        cute.copy(copy, copy.retile(rO), copy.partition_D(self.tile()))

    def tile(self) -> cute.Tensor:
        """O of the warpgroup in shared memory (rows, columns)."""
        c = self.config
        stride = (c.o_bytes if c.own_output else c.q_bytes) // c.out_dtype.bytes
        layout = tile_layout(self.dtype, WGMMA_M, c.head_dim_v_padded, 1).outer
        layout = cute.make_layout((*layout.shape[:2], c.warpgroups), stride=(*layout.stride[:2], stride))
        return cute.make_tensor(self.out, layout)[None, None, self.index]
