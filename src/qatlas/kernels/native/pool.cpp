// The pool of pool.h. A worker that has nothing to do spins for some microseconds, since the next product of a model comes soon, and then sleeps.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define QN_PAUSE() _mm_pause()
#else
#define QN_PAUSE() std::this_thread::yield()
#endif

namespace {

constexpr int SPINS = 1500, MOST = 256;

struct Pool {
    std::atomic<bool> taken{false};
    std::atomic<uint64_t> turn{0};        // grows by one with each call
    std::mutex mutex;
    std::condition_variable wake, done;
    int threads = 0;                      // workers that live
    QnWork work = nullptr;
    void* what = nullptr;
    int64_t count = 0;
    int wanted = 0;                       // workers that may join this call; under the mutex
    int inside = 0;                       // workers in this call; under the mutex
    std::atomic<int64_t> next{0};
    std::atomic<int> working{0};

    void share() {
        for (int64_t number; (number = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(what, number);
    }

    void live() {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < SPINS && turn.load(std::memory_order_relaxed) == seen; spin++) QN_PAUSE();
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return turn.load(std::memory_order_relaxed) != seen; });
                seen = turn.load(std::memory_order_relaxed);
                if (wanted == 0) continue;
                wanted--;
                inside++;
                working.fetch_add(1, std::memory_order_relaxed);
            }
            share();
            std::lock_guard<std::mutex> lock(mutex);
            working.fetch_sub(1, std::memory_order_release);
            if (--inside == 0) done.notify_one();
        }
    }

    void run(QnWork given, void* given_what, int64_t given_count, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            work = given, what = given_what, count = given_count;
            next.store(0, std::memory_order_relaxed);
            while (threads < helpers) {
                std::thread([this] { live(); }).detach();
                threads++;
            }
            wanted = helpers;
            turn.fetch_add(1, std::memory_order_relaxed);
        }
        wake.notify_all();
        share();
        {
            std::lock_guard<std::mutex> lock(mutex);
            wanted = 0;                   // who wakes now comes too late
        }
        for (int spin = 0; spin < SPINS && working.load(std::memory_order_acquire) != 0; spin++) QN_PAUSE();
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, [&] { return inside == 0; });
    }
};

std::atomic<Pool*> pool{nullptr};

#if !defined(_WIN32)
void forget() { pool.store(nullptr); }    // in a child of fork: the parent's pool stays where it is, untouched
#endif

Pool* current() {
    Pool* found = pool.load();
    if (found != nullptr) return found;
#if !defined(_WIN32)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget); });
#endif
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return made;
    delete made;
    return found;
}

}  // namespace

void qn_run(QnWork work, void* what, int64_t count, int32_t threads) {
    int64_t helpers = (threads < count ? threads : count) - 1;
    if (helpers > MOST) helpers = MOST;
    if (helpers > 0) {
        Pool* found = current();
        if (!found->taken.exchange(true, std::memory_order_acquire)) {
            bool made = true;
            try {
                found->run(work, what, count, static_cast<int>(helpers));
            } catch (...) {               // no thread could be made: nothing has begun
                made = false;
            }
            found->taken.store(false, std::memory_order_release);
            if (made) return;
        }
    }
    for (int64_t number = 0; number < count; number++) work(what, number);
}
