// A pool of threads that wait for work. `run` gives the numbers 0 .. count - 1 to up to `threads` threads, the caller among them, and returns when
// all are done. One call at a time has the pool; a call that finds it taken (another Python thread) works alone. A child of fork starts with a pool
// of its own: the threads of its parent are not there.
#pragma once
#include <stdint.h>

typedef void (*QnWork)(void* what, int64_t number);

void qn_run(QnWork work, void* what, int64_t count, int32_t threads);
