/* Threads that live from batch to batch: one lock, a queue of jobs that lie on their callers' stacks, two conditions to wait for.
 *
 * A job stands in the queue until a thread has found nothing left of it, and ends when the last thread has left it; then no one knows of
 * its memory any more.
 */
#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

typedef struct wf_pool_job {
    wf_work work;
    void *shared;
    int64_t items;
    atomic_llong next_item;
    /* the rest under the lock */
    struct wf_pool_job *behind; /* in the queue */
    bool queued;
    int inside; /* threads that work on it */
    wf_status status;
    char *message; /* of the caller */
} wf_pool_job;

/* The threads of one process. */
typedef struct wf_crew {
    pid_t process;
    struct wf_crew *of_parent; /* never touched: its lock may have been held when this process was forked */
    pthread_mutex_t lock;
    pthread_cond_t job_came, job_ended;
    wf_pool_job *first, *last;
    bool leaving;
    int started;
    pthread_t thread[];
} wf_crew;

struct wf_pool {
    int threads;
    atomic_bool closed;
    _Atomic(wf_crew *) crew; /* of the process that used it last */
};

wf_pool *wf_pool_make(int threads)
{
    wf_pool *pool = calloc(1, sizeof *pool);
    if (pool)
        pool->threads = threads;
    return pool;
}

static void free_crew(wf_crew *crew)
{
    if (crew->process == getpid()) {
        pthread_cond_destroy(&crew->job_ended);
        pthread_cond_destroy(&crew->job_came);
        pthread_mutex_destroy(&crew->lock);
    }
    free(crew);
}

/* Return the crew of this process, a new one where the pool has none here; NULL if there is no memory. */
static wf_crew *own_crew(wf_pool *pool)
{
    wf_crew *known = atomic_load(&pool->crew);
    while (!known || known->process != getpid()) {
        wf_crew *crew = calloc(1, sizeof *crew + (size_t)pool->threads * sizeof *crew->thread);
        if (!crew)
            return NULL;
        crew->process = getpid();
        crew->of_parent = known;
        pthread_mutex_init(&crew->lock, NULL);
        pthread_cond_init(&crew->job_came, NULL);
        pthread_cond_init(&crew->job_ended, NULL);
        if (atomic_compare_exchange_strong(&pool->crew, &known, crew))
            return crew;
        free_crew(crew); /* another thread was faster */
    }
    return known;
}

/* Work on items that no other thread has taken, until there are none or one fails. */
static wf_status take_items(wf_pool_job *job, char message[WF_MESSAGE_BYTES])
{
    wf_status status = WF_DONE;
    int64_t item;
    while (status == WF_DONE && (item = atomic_fetch_add(&job->next_item, 1)) < job->items)
        status = job->work(job->shared, item, message);
    if (status != WF_DONE)
        atomic_store(&job->next_item, job->items);
    return status;
}

static void name_thread(void)
{
#if defined(__linux__)
    prctl(PR_SET_NAME, "wherefrom-views");
#elif defined(__APPLE__)
    pthread_setname_np("wherefrom-views");
#endif
}

static void *serve(void *shared)
{
    wf_crew *crew = shared;
    char message[WF_MESSAGE_BYTES];
    name_thread();
    pthread_mutex_lock(&crew->lock);
    while (true) {
        while (!crew->first && !crew->leaving)
            pthread_cond_wait(&crew->job_came, &crew->lock);
        wf_pool_job *job = crew->first;
        if (!job)
            break;
        job->inside++;
        pthread_mutex_unlock(&crew->lock);
        const wf_status status = take_items(job, message);
        pthread_mutex_lock(&crew->lock);
        if (status != WF_DONE && job->status == WF_DONE) { /* the first that failed is told of */
            job->status = status;
            memcpy(job->message, message, sizeof message);
        }
        if (crew->first == job) { /* else another thread has taken it out: it was the first when this one entered */
            crew->first = job->behind;
            job->queued = false;
        }
        if (--job->inside == 0)
            pthread_cond_broadcast(&crew->job_ended);
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

/* Make the threads that are not there yet, as many as the system grants. The caller holds the lock. */
static void start_threads(wf_crew *crew, int threads)
{
    if (crew->started == threads)
        return;
    /* signals are for the threads of the program, but for those that a thread's own fault raises */
    static const int OWN[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof OWN / sizeof *OWN; i++)
        sigdelset(&blocked, OWN[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (crew->started < threads && pthread_create(&crew->thread[crew->started], NULL, serve, crew) == 0)
        crew->started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Queue a job and wait until it has ended. The caller holds the lock. */
static void wait_for(wf_crew *crew, wf_pool_job *job)
{
    if (crew->first)
        crew->last->behind = job;
    else
        crew->first = job;
    crew->last = job;
    job->queued = true;
    pthread_cond_broadcast(&crew->job_came);
    while (job->queued || job->inside)
        pthread_cond_wait(&crew->job_ended, &crew->lock);
}

wf_status wf_pool_run(wf_pool *pool, int64_t items, wf_work work, void *shared, char message[WF_MESSAGE_BYTES])
{
    wf_pool_job job = {.work = work, .shared = shared, .items = items, .status = WF_DONE, .message = message};
    if (!pool)
        return take_items(&job, message);
    wf_crew *crew = own_crew(pool);
    if (!crew) {
        snprintf(message, WF_MESSAGE_BYTES, "no memory for %d threads", pool->threads);
        return WF_NO_MEMORY;
    }
    pthread_mutex_lock(&crew->lock);
    const bool closed = atomic_load(&pool->closed);
    if (!closed)
        start_threads(crew, pool->threads);
    const bool alone = !crew->started;
    if (!closed && !alone)
        wait_for(crew, &job);
    pthread_mutex_unlock(&crew->lock);
    if (closed) {
        snprintf(message, WF_MESSAGE_BYTES, "the threads are closed; make others");
        return WF_CLOSED;
    }
    return alone ? take_items(&job, message) : job.status;
}

void wf_pool_close(wf_pool *pool)
{
    atomic_store(&pool->closed, true); /* before looking for a crew: whoever makes one now sees it */
    wf_crew *crew = atomic_load(&pool->crew);
    if (!crew || crew->process != getpid())
        return;
    pthread_mutex_lock(&crew->lock);
    const int started = crew->started;
    crew->started = 0; /* they are this caller's to wait for */
    crew->leaving = true;
    pthread_cond_broadcast(&crew->job_came);
    pthread_mutex_unlock(&crew->lock);
    for (int i = 0; i < started; i++)
        pthread_join(crew->thread[i], NULL);
}

void wf_pool_free(wf_pool *pool)
{
    wf_pool_close(pool);
    for (wf_crew *crew = atomic_load(&pool->crew), *of_parent; crew; crew = of_parent) {
        of_parent = crew->of_parent;
        free_crew(crew);
    }
    free(pool);
}
