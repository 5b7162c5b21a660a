/* Several callers use one pool of threads at once, of which the system may grant too few, while it is closed or the process is forked.
 *
 * Here: what must hold beside memory safety: every item is done once and by the time the call returns, or the call says why not; views are
 * those of one thread, bit for bit; nothing hangs.
 * Not here: what sees a race, a wrong access or a leak (ThreadSanitizer, AddressSanitizer: test_native_safety.py).
 * Usage: race_thread_pool ROUNDS SEED PLANT; PLANT is "nothing", or what is done wrong.
 * Build: thread_pool.c with -Dpthread_create=scarce_pthread_create, for calloc alike, so that they can fail; all with -DFORKS where no
 * sanitizer is: theirs do not live through a fork among threads.
 */
#include "thread_pool.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_CALLERS = 4, MOST_ITEMS = 40, JOBS = 12, PICTURES = 6, SIDE = 20, VIEW_VALUES = 3 * 9 * 7, HANGS_AFTER_S = 300 };

#if defined(FORKS)
static const bool forking = true;
#else
static const bool forking = false;
#endif
static uint64_t seed;
static const char *plant;
static struct {
    atomic_llong done, failed, closed, starved, alone, rendered;
    long long forked;
} counts;

static uint64_t draw(uint64_t *state, uint64_t below)
{
    /* splitmix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 */
    uint64_t mixed = *state += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return (mixed ^ mixed >> 31) % below;
}

static void fail(const char *what)
{
    fprintf(stderr, "seed %" PRIu64 ": %s\n", seed, what);
    _exit(1);
}

static atomic_int grants_left = INT_MAX; /* of memory and threads to the pool */

void *scarce_calloc(size_t count, size_t bytes)
{
    return atomic_fetch_sub(&grants_left, 1) > 0 ? calloc(count, bytes) : NULL;
}

int scarce_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*start)(void *), void *argument)
{
    return atomic_fetch_sub(&grants_left, 1) > 0 ? pthread_create(thread, how, start, argument) : EAGAIN;
}

typedef struct {
    pthread_t caller;
    int64_t fails_at;      /* -1: no item fails */
    int times[MOST_ITEMS]; /* without a lock: an item is one thread's */
    int sum;               /* of all, planted: everyone's, without a lock */
} job;

static wf_status count_item(void *shared, int64_t item, char message[WF_MESSAGE_BYTES])
{
    job *of = shared;
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    if (pthread_equal(pthread_self(), of->caller))
        atomic_fetch_add(&counts.alone, 1);
    else if (!sigismember(&blocked, SIGINT) || sigismember(&blocked, SIGSEGV))
        fail("a thread of the pool takes the program's signals, or not its own");
    of->times[item] += strcmp(plant, "idle") != 0;
    if (strcmp(plant, "race") == 0)
        of->sum++;
    if (item != of->fails_at)
        return WF_DONE;
    snprintf(message, WF_MESSAGE_BYTES, "item %lld", (long long)item);
    return WF_BAD_PICTURE;
}

static void count_job(wf_pool *pool, uint64_t *state)
{
    const int64_t items = (int64_t)draw(state, MOST_ITEMS + 1);
    job *of = calloc(1, sizeof *of); /* given back at once: a thread that still works on it is seen */
    of->caller = pthread_self();
    of->fails_at = draw(state, 4) ? -1 : (int64_t)draw(state, MOST_ITEMS);
    char message[WF_MESSAGE_BYTES] = {0}, expected[WF_MESSAGE_BYTES];
    const wf_status status = wf_pool_run(pool, items, count_item, of, message);
    const bool fails = of->fails_at >= 0 && of->fails_at < items;
    snprintf(expected, sizeof expected, "item %lld", (long long)of->fails_at);
    if (fails ? status == WF_DONE : status == WF_BAD_PICTURE)
        fail("a job ends well of which an item failed, or fails of which none did");
    if (status == WF_BAD_PICTURE && strcmp(message, expected) != 0)
        fail("what failed is not what is told of");
    for (int64_t i = 0; i < MOST_ITEMS; i++) {
        if (of->times[i] > (i < items))
            fail("an item is done twice, or is none");
        if (status == WF_DONE && i < items && !of->times[i])
            fail("a job is done of which items are not");
        if (of->times[i] && (status == WF_CLOSED || status == WF_NO_MEMORY))
            fail("a pool does what it says it did not");
    }
    atomic_fetch_add(status == WF_DONE        ? &counts.done
                     : status == WF_CLOSED    ? &counts.closed
                     : status == WF_NO_MEMORY ? &counts.starved
                                              : &counts.failed,
                     1);
    free(of);
}

static unsigned char noise[PICTURES][SIDE * SIDE * 3];
static float expected_views[PICTURES * VIEW_VALUES];

static wf_plan *make_plan(float *out)
{
    float boxes[PICTURES][4];
    uint8_t flipped[PICTURES];
    int64_t turns[PICTURES];
    float sigma_px[PICTURES];
    for (int b = 0; b < PICTURES; b++) {
        memcpy(boxes[b], (float[]){0.5f * (float)b, 1.25f, 12.5f + (float)b, 19}, sizeof boxes[b]);
        flipped[b] = b & 1;
        turns[b] = 2 * (b % 2);
        sigma_px[b] = (float)(b % 3);
    }
    const wf_family family = {.views = 1, .height = 9, .width = 7, .dtype = WF_FLOAT32, .boxes = boxes[0], .flipped = flipped,
                              .quarter_turns = turns, .blur_sigma_px = sigma_px, .scale = {1, 1, 1}, .out = out};
    wf_plan *plan;
    char message[WF_MESSAGE_BYTES];
    if (wf_plan_make(&plan, PICTURES, NULL, 1, &family, wf_best_instruction_set(), message) != WF_DONE)
        fail(message);
    return plan;
}

static wf_status render_item(void *plan, int64_t item, char message[WF_MESSAGE_BYTES])
{
    return wf_render_picture(plan, item, &(wf_picture){.pixels = noise[item], .height = SIDE, .width = SIDE}, message);
}

static void render_job(wf_pool *pool)
{
    float *out = calloc(PICTURES * VIEW_VALUES, sizeof *out);
    wf_plan *plan = make_plan(out);
    char message[WF_MESSAGE_BYTES];
    const wf_status status = wf_pool_run(pool, PICTURES, render_item, plan, message);
    if (status == WF_DONE && memcmp(out, expected_views, sizeof expected_views) != 0)
        fail("views differ from those of one thread");
    atomic_fetch_add(&counts.rendered, status == WF_DONE);
    wf_plan_free(plan);
    free(out);
}

typedef struct {
    wf_pool *pool;
    uint64_t state;
    bool closes;
} caller;

static void *call(void *shared)
{
    caller *own = shared;
    for (int i = 0; i < JOBS; i++) {
        if (own->closes && draw(&own->state, JOBS) == 0)
            wf_pool_close(own->pool);
        if (draw(&own->state, 4))
            count_job(own->pool, &own->state);
        else
            render_job(own->pool);
    }
    return NULL;
}

/* What a process does that was forked while others used the pool: none of its threads is there. */
static void call_in_child(wf_pool *pool, uint64_t state)
{
    for (int i = 0; i < 3; i++) {
        count_job(pool, &state);
        render_job(pool);
    }
    wf_pool_free(pool);
    _exit(counts.alone ? 3 : counts.done + counts.failed == 3 && counts.rendered == 3 ? 0 : 4);
}

static void play_round(uint64_t *state)
{
    const bool forks = forking && draw(state, 3) == 0, starves = !forks && draw(state, 3) == 0, closes = !forks && draw(state, 3) == 0;
    wf_pool *pool = wf_pool_make(1 + (int)draw(state, 4));
    atomic_store(&grants_left, starves ? (int)draw(state, 4) : INT_MAX);
    pthread_t thread[MOST_CALLERS];
    caller of[MOST_CALLERS];
    const int callers = 1 + (int)draw(state, MOST_CALLERS);
    for (int i = 0; i < callers; i++) {
        of[i] = (caller){.pool = pool, .state = draw(state, UINT64_MAX), .closes = closes};
        pthread_create(&thread[i], NULL, call, &of[i]);
    }
    if (forks) {
        count_job(pool, state);
        const pid_t child = fork();
        if (child == 0) {
            counts.done = counts.failed = counts.rendered = counts.alone = 0;
            call_in_child(pool, *state);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
            fail("a forked process does not work on");
        counts.forked++;
    }
    for (int i = 0; i < callers; i++)
        pthread_join(thread[i], NULL);
    if (strcmp(plant, "leak") != 0)
        wf_pool_free(pool);
    atomic_store(&grants_left, INT_MAX);
}

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool begun, came;
} meeting;

static void note(meeting *place, bool *what)
{
    pthread_mutex_lock(&place->lock);
    *what = true;
    pthread_cond_broadcast(&place->changed);
    pthread_mutex_unlock(&place->lock);
}

static void await(meeting *place, const bool *what)
{
    pthread_mutex_lock(&place->lock);
    while (!*what)
        pthread_cond_wait(&place->changed, &place->lock);
    pthread_mutex_unlock(&place->lock);
}

static wf_status wait_for_the_other(void *shared, int64_t item, char *message)
{
    (void)item, (void)message;
    meeting *place = shared;
    note(place, &place->begun);
    await(place, &place->came);
    return WF_DONE;
}

static wf_status come(void *shared, int64_t item, char *message)
{
    (void)item, (void)message;
    meeting *place = shared;
    note(place, &place->came);
    return WF_DONE;
}

typedef struct {
    wf_pool *pool;
    meeting place;
} pair;

static void *run_waiting(void *shared)
{
    pair *of = shared;
    char message[WF_MESSAGE_BYTES];
    if (wf_pool_run(of->pool, 1, wait_for_the_other, &of->place, message) != WF_DONE)
        fail("a job that waits is refused");
    return NULL;
}

/* The first job ends only once the second has: a thread that is idle must not wait for the first. */
static void help_with_the_next(void)
{
    pair of = {.pool = wf_pool_make(2), .place = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}};
    pthread_t first;
    pthread_create(&first, NULL, run_waiting, &of);
    await(&of.place, &of.place.begun);
    char message[WF_MESSAGE_BYTES];
    if (wf_pool_run(of.pool, 1, come, &of.place, message) != WF_DONE)
        fail("the second job is refused");
    pthread_join(first, NULL);
    wf_pool_free(of.pool);
}

/* Fails unless every way that a job may end was seen. */
int main(int arguments, char **argument)
{
    if (arguments != 4) {
        fprintf(stderr, "usage: %s ROUNDS SEED PLANT, e.g. 100 1 nothing\n", argument[0]);
        return 2;
    }
    const long rounds = strtol(argument[1], NULL, 10);
    uint64_t state = seed = strtoull(argument[2], NULL, 10);
    plant = argument[3];
    alarm(HANGS_AFTER_S); /* rather than for ever */
    for (int b = 0; b < PICTURES; b++)
        for (int i = 0; i < SIDE * SIDE * 3; i++)
            noise[b][i] = (unsigned char)draw(&state, 256);
    wf_plan *plan = make_plan(expected_views);
    char message[WF_MESSAGE_BYTES];
    if (wf_pool_run(NULL, PICTURES, render_item, plan, message) != WF_DONE)
        fail(message);
    wf_plan_free(plan);
    help_with_the_next();
    for (long i = 0; i < rounds; i++)
        play_round(&state);
    printf("%ld rounds: %lld jobs done, %lld failed, %lld closed, %lld short of memory, %lld items without threads, %lld rendered, "
           "%lld forks\n",
           rounds, counts.done, counts.failed, counts.closed, counts.starved, counts.alone, counts.rendered, counts.forked);
    const bool shown = counts.done && counts.failed && counts.closed && counts.starved && counts.alone && counts.rendered;
    return shown && (counts.forked || !forking) ? 0 : 1;
}
