/* Threads that live from batch to batch and share the work of one after the other. Plain C11, no Python.
 *
 * Here: what a caller sees. Any number of callers hand over jobs, each waits for its own; jobs are begun in the order in which they came,
 * and a thread that finds nothing left of one goes on with the next.
 * Not here: what is done to a picture (render_views_core.c, decode_region.c).
 */
#ifndef WHEREFROM_THREAD_POOL_H
#define WHEREFROM_THREAD_POOL_H

#include <stdint.h>

#include "render_views_core.h"

typedef struct wf_pool wf_pool;

/* What is done to item number `item` of a job; `message` says in one line what was wrong. */
typedef wf_status (*wf_work)(void *shared, int64_t item, char message[WF_MESSAGE_BYTES]);

/* A pool of `threads` threads, 1 or more, made when there is work, in each process that has some: a fork takes none along. NULL if there is
 * no memory. */
wf_pool *wf_pool_make(int threads);

/* Work on items 0 to items - 1, each once, in no order, and wait until no thread works on any. Once one fails no more are begun, and what it
 * said is returned. Where the system grants fewer threads fewer do, the caller's own at the worst; pool NULL: that one. Safe from many
 * threads at once. WF_CLOSED if the pool is. */
wf_status wf_pool_run(wf_pool *pool, int64_t items, wf_work work, void *shared, char message[WF_MESSAGE_BYTES]);

/* End the threads once nothing is left of the jobs that they have; twice is fine, and from many threads at once. */
void wf_pool_close(wf_pool *pool);

/* Close the pool, which nobody uses any more, and give back its memory. */
void wf_pool_free(wf_pool *pool);

#endif
