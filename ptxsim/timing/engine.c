// Streaming multiprocessors, cycle by cycle: four quarters that issue one warp instruction a cycle, their pipes, tensor cores,
// mbarriers, named and cluster barriers, TMA, and an L2 cache that all of them share. What is executed comes from paths
// (replay.py, where the rows and constants are described); nothing is computed.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef int32_t i32;

enum Operation {
    NONE, TRY, ARRIVE, INIT, BAR_SYNC, BAR_ARRIVE, WGMMA, WGMMA_WAIT, TMA_LOAD, TMA_TARGET, STORE, REDUCE, CP_ASYNC, CP_ARRIVE,
    COMMIT, GROUP_WAIT, CLUSTER_ARRIVE, CLUSTER_WAIT, DROP
};
enum Reason {
    ISSUED, STALL, SCOREBOARD, MBARRIER, NAMED_BARRIER, WGMMA_DONE, PIPE, NOT_SELECTED, WGMMA_QUEUE, PORTS, GROUP, CLUSTER, REASONS
};
// GROUPS: a wait for groups of copies leaves at most 63 pending. QUEUE: replay.py lets no more products wait for an SM.
enum { PIPES = 10, LSU = 5, SCOREBOARDS = 6, BARRIERS = 16, GROUPS = 64, QUEUE = 512, PARTS = 4, LSU_SLACK = 400,
       SM_WARPS = 64 };
#define NEVER INT64_MAX

typedef struct { i32 stall, write, read, wait, pipe, taken_milli, latency, read_latency, branch, reads, shared, reduced; } Instruction;
typedef struct { i32 instruction, operation, a, b, c; } Row;
typedef struct {
    double try_wait, wake, arrive, remote_arrive, bar, cluster_barrier, branch, wgmma_issue, wgmma_tail, wgmma_least, wgmma_queue,
        tensor_flops, shared_bytes, tma_setup, tma_latency, tma_interval, tma_bytes, store_latency, global_latency, cta_start,
        register_ports, register_tensor, slots_lost, shared_slack, l2_bytes, l2_reduced_bytes, sm_reduced_bytes,
        l2_saved;
} Constants;
typedef struct { i32 expected, pending, phase, owner; i64 bytes, flipped; } Mbarrier;
typedef struct { i32 arrived; i64 generation, released; } Named;
typedef struct { i32 flops, shared, commit, fp8, issued; } Product;
typedef struct { i64 time; i32 kind, at; i64 amount; } Event;  // kind 0: arrivals, 1: bytes
typedef struct {  // a warpgroup's products, which its four warps issue one after the other
    Product open[QUEUE];
    i32 issued_by[PARTS], begun;
    i64 done[QUEUE];  // when each committed group ends, modulo QUEUE
    i32 finished;     // groups that have an end
} Warpgroup;
typedef struct {
    i32 group, cta, part, sm, alive, blocked, waits_at;
    i64 end_row, row, next, last, ended;
    i64 scoreboard[SCOREBOARDS];
    i32 try_bar, try_parity, try_scoreboard;
    i64 try_issued, wait_generation, cluster_generation;
    i32 groups, products;  // committed groups of copies; of products
    i64 open_until, group_done[GROUPS];  // end of the copies so far; of each group
    double served;  // when the L2 gives what the latest TMA load asks for
    i64 why[REASONS], before[REASONS], until;  // until: when what it waits for now is over, NEVER if that is not known yet
    int reason;
} Warp;
typedef struct { i32 group; Product product; i64 ready; } Queued;
typedef struct {
    double pipe_free[PARTS][PIPES], debt[PARTS], port_free, reduce_free, tensor_free, tma_free, tensor_busy, tensor_shared, shared;
    double waiting;  // shared memory's work beside the products that waits, in cycles
    i64 pipe_busy[PARTS][PIPES], lsu_blocked, issued, tma_bytes;
    i64 wake, visited;  // nothing can happen before wake; the latest cycle that has been looked at
    i32 warps[PARTS][2 * SM_WARPS], counts[PARTS], resident;
    Queued queue[QUEUE];
    i32 head, length;
} Sm;
typedef struct { i32 arrived, needed; i64 generation, released; } ClusterBarrier;

typedef struct {
    const Instruction *code;
    const Row *rows;
    Constants c;
    Warp *warps;
    Warpgroup *groups;
    Mbarrier *bars;
    Named *named;
    ClusterBarrier *clusters;
    Sm *sms;
    Event *heap;
    i64 heap_length, heap_room, now, marked, *marks;
    i32 *times, *waited;
    double l2_credit, l2_time;
    i32 *sm_of;
    i32 cluster_size;
} Engine;

static i64 ceil_of(double x) { return (i64)x + (x > (double)(i64)x); }

static void push(Engine *e, Event x) {
    if (e->heap_length == e->heap_room) e->heap = realloc(e->heap, sizeof(Event) * (e->heap_room *= 2));
    i64 k = e->heap_length++;
    while (k && e->heap[(k - 1) / 2].time > x.time) { e->heap[k] = e->heap[(k - 1) / 2]; k = (k - 1) / 2; }
    e->heap[k] = x;
}

static Event pop(Engine *e) {
    Event top = e->heap[0], x = e->heap[--e->heap_length];
    i64 k = 0;
    for (;;) {
        i64 child = 2 * k + 1;
        if (child >= e->heap_length) break;
        if (child + 1 < e->heap_length && e->heap[child + 1].time < e->heap[child].time) child++;
        if (e->heap[child].time >= x.time) break;
        e->heap[k] = e->heap[child];
        k = child;
    }
    e->heap[k] = x;
    return top;
}

static void settle(Engine *e, Mbarrier *b) {
    while (b->pending <= 0 && b->bytes == 0 && b->expected) {
        b->phase ^= 1;
        b->pending += b->expected;
        b->flipped = e->now;
        e->sms[e->sm_of[b->owner]].wake = e->now;
    }
}

// When the L2 has served so many bytes that are asked for at a time; of its rate a share may have been saved.
static double l2_served(Engine *e, double time, double bytes) {
    Constants *c = &e->c;
    if (c->l2_bytes <= 0) return time;
    if (time > e->l2_time) {
        e->l2_credit += c->l2_bytes * (time - e->l2_time);
        if (e->l2_credit > c->l2_saved) e->l2_credit = c->l2_saved;
        e->l2_time = time;
    }
    e->l2_credit -= bytes;
    return e->l2_credit >= 0 ? time : e->l2_time - e->l2_credit / c->l2_bytes;
}

// Work of shared memory beside the products.
static void use_shared(Sm *sm, double cycles) {
    sm->shared += cycles;
    sm->waiting += cycles;
}

// The tensor cores take the next product in the order of issue.
static void feed_tensor_cores(Engine *e, Sm *sm) {
    Constants *c = &e->c;
    while (sm->length && sm->tensor_free <= e->now) {
        Queued *q = &sm->queue[sm->head];
        if (q->ready > e->now) return;
        Product p = q->product;
        Warpgroup *g = &e->groups[q->group];
        double duration = p.flops / (c->tensor_flops * (p.fp8 ? 2 : 1)), least = p.shared / c->shared_bytes;
        if (duration < c->wgmma_least) duration = c->wgmma_least;
        if (duration < least) duration = least;
        double start = sm->tensor_free > e->now - 1 ? sm->tensor_free : e->now;
        sm->tensor_busy += duration;
        if (c->shared_slack > 0) {  // what the products leave of its rate serves the others; too much that waits slows them
            sm->waiting -= start - sm->tensor_free + duration - least;
            if (sm->waiting < 0) sm->waiting = 0;
            if (sm->waiting > c->shared_slack) { duration += sm->waiting - c->shared_slack; sm->waiting = c->shared_slack; }
        }
        sm->tensor_free = start + duration;
        sm->tensor_shared += least;
        g->begun++;
        if (p.commit) g->done[g->finished++ % QUEUE] = (i64)(sm->tensor_free + c->wgmma_tail);
        i64 *m = e->marks + 4 * e->marked++;
        m[0] = q->group; m[1] = (i64)start; m[2] = (i64)sm->tensor_free; m[3] = p.commit;
        sm->head = (sm->head + 1) % QUEUE;
        sm->length--;
    }
}

static int try_passed(Engine *e, Warp *w) {
    Mbarrier *b = &e->bars[w->try_bar];
    w->until = NEVER;
    if (b->phase == w->try_parity) return 0;
    i64 at = w->try_issued + (i64)e->c.try_wait, woken = b->flipped + (i64)e->c.wake;
    w->until = at > woken ? at : woken;
    if (e->now < w->until) return 0;
    w->try_bar = -1;
    return 1;
}

// Why the warp cannot issue now, and until when if that is known; ISSUED if it can.
static int obstacle(Engine *e, Warp *w) {
    Constants *c = &e->c;
    i64 now = e->now;
    if (w->blocked == NAMED_BARRIER) {
        Named *n = &e->named[w->cta * BARRIERS + w->waits_at];
        w->until = n->generation == w->wait_generation ? NEVER : n->released + (i64)c->bar;
        if (w->until > now) return NAMED_BARRIER;
        w->blocked = 0;
    }
    if ((w->until = w->next) > now) return STALL;
    const Row *row = &e->rows[w->row];
    const Instruction *i = &e->code[row->instruction];
    for (int k = 0; k < SCOREBOARDS; k++)
        if (i->wait >> k & 1) {
            if (w->try_scoreboard == k && w->try_bar >= 0) {
                if (!try_passed(e, w)) return MBARRIER;
            } else if ((w->until = w->scoreboard[k]) > now) return SCOREBOARD;
        }
    Warpgroup *g = &e->groups[w->group];
    switch (row->operation) {
    case WGMMA_WAIT: {
        i32 needed = w->products - row->a;
        if (needed <= 0) break;
        w->until = g->finished < needed ? NEVER : g->done[(needed - 1) % QUEUE];
        if (w->until > now) return WGMMA_DONE;
        break;
    }
    case GROUP_WAIT: {  // a: groups that may be pending, b: whether bulk stores have to be seen by others, too
        i32 needed = w->groups - row->a;
        if (needed > 0 && (w->until = w->group_done[(needed - 1) % GROUPS] + row->b * (i64)c->global_latency) > now) return GROUP;
        break;
    }
    case CLUSTER_WAIT: {
        ClusterBarrier *b = &e->clusters[w->cta / e->cluster_size];
        w->until = b->generation == w->cluster_generation ? NEVER : b->released + (i64)c->cluster_barrier;
        if (w->until > now) return CLUSTER;
        break;
    }
    case TRY:
        if (w->try_bar >= 0 && !try_passed(e, w)) return MBARRIER;
        break;
    case WGMMA:
        w->until = NEVER;
        if (g->issued_by[w->part] - g->begun >= (i32)c->wgmma_queue) return WGMMA_QUEUE;
        break;
    }
    Sm *sm = &e->sms[w->sm];
    if (i->pipe && sm->pipe_free[w->part][i->pipe] > now) { w->until = ceil_of(sm->pipe_free[w->part][i->pipe]); return PIPE; }
    if (i->pipe == LSU && (w->until = sm->lsu_blocked) > now) return PIPE;
    return ISSUED;
}

// The cluster's barrier, when a warp has arrived or ended.
static void settle_cluster(Engine *e, i32 cluster) {
    ClusterBarrier *b = &e->clusters[cluster];
    if (!b->arrived || b->arrived < b->needed) return;
    b->arrived = 0;
    b->generation++;
    b->released = e->now;
    for (i32 k = 0; k < e->cluster_size; k++) {
        Sm *sm = &e->sms[e->sm_of[cluster * e->cluster_size + k]];
        if (sm->wake > e->now) sm->wake = e->now;
    }
}

static void perform(Engine *e, Warp *w, const Row *row, const Instruction *i) {
    Constants *c = &e->c;
    Sm *sm = &e->sms[w->sm];
    i64 now = e->now;
    switch (row->operation) {
    case TRY:
        w->try_bar = row->a; w->try_parity = row->b; w->try_scoreboard = i->write; w->try_issued = now;
        break;
    case ARRIVE: {
        Mbarrier *b = &e->bars[row->a];
        b->bytes += row->c;
        double delay = b->owner == w->cta ? c->arrive : c->remote_arrive;
        push(e, (Event){now + (i64)delay, 0, row->a, row->b});
        break;
    }
    case INIT: {
        Mbarrier *b = &e->bars[row->a];
        b->expected = b->pending = row->b;
        b->phase = 0;
        b->bytes = 0;
        break;
    }
    case DROP:  // a: mbarrier, b: how many arrivals less its later phases expect; the arrival itself follows
        e->bars[row->a].expected -= row->b;
        break;
    case BAR_SYNC: case BAR_ARRIVE: {
        Named *n = &e->named[w->cta * BARRIERS + row->a];
        if (row->operation == BAR_SYNC) { w->blocked = NAMED_BARRIER; w->waits_at = row->a; w->wait_generation = n->generation; }
        if (++n->arrived >= row->b) { n->arrived = 0; n->generation++; n->released = now; }
        break;
    }
    case CLUSTER_ARRIVE: {
        ClusterBarrier *b = &e->clusters[w->cta / e->cluster_size];
        w->cluster_generation = b->generation;
        b->arrived++;
        settle_cluster(e, w->cta / e->cluster_size);
        break;
    }
    case WGMMA: {
        Warpgroup *g = &e->groups[w->group];
        Product *p = &g->open[g->issued_by[w->part]++ % QUEUE];
        if (!p->issued) { p->flops = row->a; p->shared = row->b; p->commit = row->c & 1; p->fp8 = row->c >> 1; }
        if (p->commit) w->products++;
        if (++p->issued == PARTS) {
            sm->queue[(sm->head + sm->length++) % QUEUE] = (Queued){w->group, *p, now + (i64)c->wgmma_issue};
            p->issued = 0;
        }
        break;
    }
    case TMA_LOAD: {  // a: bytes out of the L2; its targets follow
        double start = now + c->tma_setup;
        if (sm->tma_free > start) start = sm->tma_free;
        sm->tma_free = start + c->tma_interval;
        sm->tma_bytes += row->a;
        w->served = l2_served(e, start, row->a);
        break;
    }
    case TMA_TARGET: {  // a: mbarrier, b: bytes
        Sm *target = &e->sms[e->sm_of[e->bars[row->a].owner]];
        double from = w->served > target->port_free ? w->served : target->port_free;
        target->port_free = from + row->b / c->tma_bytes;
        use_shared(target, row->b / c->shared_bytes);
        push(e, (Event){(i64)(target->port_free + c->tma_latency), 1, row->a, row->b});
        break;
    }
    case STORE: {  // a: bytes
        i64 until = (i64)(l2_served(e, now, row->a) + c->store_latency + row->a / c->tma_bytes);
        if (until > w->open_until) w->open_until = until;
        use_shared(sm, row->a / c->shared_bytes);
        break;
    }
    case REDUCE: {  // a: bytes; an SM's go one after the other
        double served = l2_served(e, now, row->a * c->l2_bytes / c->l2_reduced_bytes);
        sm->reduce_free = (sm->reduce_free > now ? sm->reduce_free : now) + row->a / c->sm_reduced_bytes;
        i64 until = (i64)((served > sm->reduce_free ? served : sm->reduce_free) + c->store_latency);
        if (until > w->open_until) w->open_until = until;
        use_shared(sm, row->a / c->shared_bytes);
        break;
    }
    case CP_ASYNC: {  // a: bytes
        i64 until = (i64)(l2_served(e, now, row->a) + c->global_latency);
        if (until > w->open_until) w->open_until = until;
        use_shared(sm, row->a / c->shared_bytes);
        break;
    }
    case CP_ARRIVE:  // a: mbarrier, b: arrivals, c: those that the present phase did not expect (no .noinc)
        e->bars[row->a].pending += row->c;
        push(e, (Event){(w->open_until > now ? w->open_until : now) + (i64)c->arrive, 0, row->a, row->b});
        break;
    case COMMIT: {
        i64 before = w->groups ? w->group_done[(w->groups - 1) % GROUPS] : 0;
        w->group_done[w->groups++ % GROUPS] = w->open_until > before ? w->open_until : before;
        break;
    }
    }
}

static void issue(Engine *e, Warp *w) {
    Constants *c = &e->c;
    Sm *sm = &e->sms[w->sm];
    i64 now = e->now;
    const Row *row = &e->rows[w->row];
    const Instruction *i = &e->code[row->instruction];
    w->why[ISSUED]++;
    sm->issued++;
    w->last = now;
    if (e->times) {
        i64 most = 0;
        for (int r = 1; r < REASONS; r++) {
            i64 cycles = w->why[r] - w->before[r];
            if (cycles > most) { most = cycles; e->waited[w->row] = r; }
            w->before[r] = w->why[r];
        }
        e->times[w->row] = (i32)now;
    }
    double stall = i->stall > 1 ? i->stall : 1;
    if (i->pipe) {
        sm->pipe_free[w->part][i->pipe] = now + i->taken_milli / 1000.0;
        sm->pipe_busy[w->part][i->pipe] += i->taken_milli;
    }
    if (i->pipe == LSU) {
        sm->lsu_blocked = now + (i->shared > 1 ? i->shared : 1);
        use_shared(sm, i->shared);
        if (i->reduced) {
            double served = l2_served(e, now, i->reduced * c->l2_bytes / c->l2_reduced_bytes) - LSU_SLACK;
            if (served > sm->lsu_blocked) sm->lsu_blocked = (i64)served;
        }
    }
    if (i->write < SCOREBOARDS && w->scoreboard[i->write] < now + i->latency) w->scoreboard[i->write] = now + i->latency;
    if (i->read < SCOREBOARDS && w->scoreboard[i->read] < now + i->read_latency) w->scoreboard[i->read] = now + i->read_latency;
    if (i->branch && row->c && stall < c->branch) stall = c->branch;
    w->next = now + (i64)stall;
    do perform(e, w, &e->rows[w->row], i);
    while (++w->row < w->end_row && e->rows[w->row].instruction < 0);
    if (w->row == w->end_row) {
        w->alive = 0;
        w->ended = now;
        e->clusters[w->cta / e->cluster_size].needed--;
        settle_cluster(e, w->cta / e->cluster_size);
    }
}

static void leave(Sm *sm, Engine *e) {  // warps that have ended are no longer looked at
    for (int p = 0; p < PARTS; p++) {
        i32 n = 0;
        for (i32 k = 0; k < sm->counts[p]; k++)
            if (e->warps[sm->warps[p][k]].alive) sm->warps[p][n++] = sm->warps[p][k];
        sm->counts[p] = n;
    }
}

// What the cycles before this one did, in which nothing could happen: warps waited as they did, ports were free.
static void catch_up(Engine *e, Sm *sm) {
    i64 missed = e->now - 1 - sm->visited;
    if (missed <= 0) return;
    sm->visited = e->now - 1;
    double ports = e->c.register_ports, free = ports - (sm->tensor_free > e->now - 1 ? e->c.register_tensor : 0);
    for (int p = 0; p < PARTS; p++) {
        for (i32 k = 0; k < sm->counts[p]; k++) {
            Warp *w = &e->warps[sm->warps[p][k]];
            if (w->alive) w->why[w->reason] += missed;
        }
        if (ports > 0 && (sm->debt[p] -= free * missed) < -ports) sm->debt[p] = -ports;
    }
}

// One cycle of an SM; what can happen next when.
static void step(Engine *e, Sm *sm, i32 *left, i32 *alive, i64 *cta_times) {
    i64 now = e->now, next = NEVER;
    catch_up(e, sm);
    sm->visited = now;
    sm->wake = NEVER;
    feed_tensor_cores(e, sm);
    int active = sm->tensor_free > now;
    if (active) next = ceil_of(sm->tensor_free);
    else if (sm->length) next = sm->queue[sm->head].ready;
    for (int p = 0; p < PARTS; p++) {
        Warp *best = 0;
        for (i32 k = 0; k < sm->counts[p]; k++) {  // the one that has issued least recently
            Warp *w = &e->warps[sm->warps[p][k]];
            if (!w->alive) continue;
            if (w->until > now && w->until < NEVER) {
                w->why[w->reason]++;
                if (w->until < next) next = w->until;
                continue;
            }
            int why = obstacle(e, w);
            if (why != ISSUED) {
                w->why[w->reason = why]++;
                if (w->until < next) next = w->until;
                continue;
            }
            next = now + 1;
            w->until = 0;
            if (!best || w->last < best->last) { if (best) best->why[NOT_SELECTED]++; best = w; }
            else w->why[NOT_SELECTED]++;
        }
        double free = e->c.register_ports - (active ? e->c.register_tensor : 0);
        if (e->c.register_ports > 0 && (sm->debt[p] -= free) < -e->c.register_ports) sm->debt[p] = -e->c.register_ports;
        if (!best) continue;
        i32 reads = e->code[e->rows[best->row].instruction].reads;
        if (e->c.register_ports > 0) {
            if (reads && sm->debt[p] > 0) { best->why[PORTS]++; continue; }
            sm->debt[p] += reads;
        } else if (active && e->c.slots_lost > 0) {
            if ((sm->debt[p] += e->c.slots_lost) >= 1) { sm->debt[p] -= 1; best->why[PORTS]++; continue; }
        }
        issue(e, best);
        if (!best->alive && !--left[best->cta]) {
            cta_times[2 * best->cta + 1] = now;
            sm->resident--;
            --*alive;
            leave(sm, e);
        }
    }
    if (next < sm->wake) sm->wake = next;
}

static void start_cta(Engine *e, i32 cta, i32 sm, i32 warps_per_cta, i64 at) {
    catch_up(e, &e->sms[sm]);
    e->sms[sm].wake = e->now;
    i32 before = 0;  // warps go to the quarters by turns, also those of further CTAs
    for (int p = 0; p < PARTS; p++) before += e->sms[sm].counts[p];
    for (i32 k = 0; k < warps_per_cta; k++) {
        i32 number = cta * warps_per_cta + k;
        Warp *w = &e->warps[number];
        w->part = (before + k) % PARTS;
        w->sm = sm;
        w->next = at;
        w->last = -1;
        if (w->alive) { Sm *s = &e->sms[sm]; s->warps[w->part][s->counts[w->part]++] = number; }
    }
    e->sms[sm].resident++;
}

// Returns 0, 1 if warps wait for ever, 2 if the limit of cycles is reached. ``out``: for each warp its end and the cycles of
// each Reason; for each SM cycles of tensor cores, shared memory (theirs, others'), instructions, TMA bytes, pipes; then
// all cycles and marks. ``cta_times``: start and end of each CTA; ``sm_of``: its SM, ``marks``: of each product warpgroup,
// start, end, whether it ends a group; ``times``, ``waited``: of each row, or none. Space of an SM: ``residency`` CTAs.
__attribute__((visibility("default")))
int ptxsim_replay(const Instruction *code, const Row *rows, const i64 *offsets, i32 n_ctas, i32 warps_per_cta, i32 cluster_size,
                  i32 n_sms, i32 residency, const i32 *owners, i32 n_bars, const Constants *constants, i64 limit, i64 *out,
                  i64 *cta_times, i32 *sm_of, i64 *marks, i32 *times, i32 *waited) {
    i32 n_warps = n_ctas * warps_per_cta, padded = (warps_per_cta + 3) / 4;
    Engine engine = {.code = code, .rows = rows, .c = *constants}, *e = &engine;
    e->warps = calloc(n_warps, sizeof(Warp));
    e->groups = calloc((i64)n_ctas * padded, sizeof(Warpgroup));
    e->bars = calloc(n_bars + 1, sizeof(Mbarrier));
    e->named = calloc((i64)n_ctas * BARRIERS, sizeof(Named));
    e->clusters = calloc(n_ctas / cluster_size + 1, sizeof(ClusterBarrier));
    e->sms = calloc(n_sms, sizeof(Sm));
    e->heap = malloc(sizeof(Event) * (e->heap_room = 1024));
    i32 *left = calloc(n_ctas, sizeof(i32));
    e->sm_of = sm_of; e->cluster_size = cluster_size;
    e->marks = marks; e->times = times; e->waited = waited;
    e->l2_credit = e->c.l2_saved;
    for (i32 k = 0; k < n_bars; k++) e->bars[k].owner = owners[k];
    for (i32 k = 0; k < n_warps; k++) {
        Warp *w = &e->warps[k];
        w->cta = k / warps_per_cta;
        w->group = w->cta * padded + k % warps_per_cta / PARTS;
        w->row = offsets[k];
        w->end_row = offsets[k + 1];
        w->alive = w->row < w->end_row;
        w->try_bar = -1;
        left[w->cta] += w->alive;
        e->clusters[w->cta / cluster_size].needed += w->alive;
    }
    i32 launched = 0, alive = n_ctas, bad = 0;
    while (alive) {
        // CTAs of whole clusters begin where there is most room
        while (launched < n_ctas) {
            i32 best = -1, fewest = residency;
            for (i32 first = 0; first + cluster_size <= n_sms; first += cluster_size) {
                i32 most = 0;
                for (i32 k = 0; k < cluster_size; k++) if (e->sms[first + k].resident > most) most = e->sms[first + k].resident;
                if (most < fewest) { fewest = most; best = first; }
            }
            if (best < 0) break;
            i64 at = e->now + (e->now ? (i64)e->c.cta_start : 0);
            for (i32 k = 0; k < cluster_size; k++) {
                sm_of[launched] = best + k;
                cta_times[2 * launched] = at;
                start_cta(e, launched++, best + k, warps_per_cta, at);
            }
        }
        while (e->heap_length && e->heap[0].time <= e->now) {
            Event x = pop(e);
            Mbarrier *b = &e->bars[x.at];
            if (x.kind) b->bytes -= x.amount; else b->pending -= (i32)x.amount;
            settle(e, b);
        }
        i64 next = NEVER;
        for (i32 s = 0; s < n_sms; s++)
            if (e->sms[s].wake <= e->now) step(e, &e->sms[s], left, &alive, cta_times);
        if (!alive) { e->now++; break; }
        for (i32 s = 0; s < n_sms; s++) if (e->sms[s].wake < next) next = e->sms[s].wake;
        if (e->heap_length && e->heap[0].time < next) next = e->heap[0].time;
        if (next == NEVER) { bad = 1; break; }
        e->now = next > e->now ? next : e->now + 1;
        if (e->now > limit) { bad = 2; break; }
    }
    i64 *o = out;
    for (i32 k = 0; k < n_warps; k++) {
        *o++ = e->warps[k].alive ? -(e->warps[k].row + 1) : e->warps[k].ended;
        for (int r = 0; r < REASONS; r++) *o++ = e->warps[k].why[r];
    }
    for (i32 s = 0; s < n_sms; s++) {
        Sm *sm = &e->sms[s];
        *o++ = (i64)(sm->tensor_busy + 0.5); *o++ = (i64)(sm->tensor_shared + 0.5); *o++ = (i64)(sm->shared + 0.5);
        *o++ = sm->issued; *o++ = sm->tma_bytes;
        for (int q = 0; q < PIPES; q++) {
            i64 busy = 0;
            for (int p = 0; p < PARTS; p++) busy += sm->pipe_busy[p][q];
            *o++ = busy / 1000;
        }
    }
    *o++ = e->now;
    *o++ = e->marked;
    free(e->warps); free(e->groups); free(e->bars); free(e->named); free(e->clusters); free(e->sms); free(e->heap);
    free(left);
    return bad;
}
