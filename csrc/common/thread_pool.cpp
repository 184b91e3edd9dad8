#include "uma/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define UMA_PAUSE() _mm_pause()
#else
#define UMA_PAUSE() std::this_thread::yield()
#endif

namespace uma {
namespace {

// A helper spins this long for the next job before it sleeps: kernels of one layer follow each other within it, and an
// idle engine costs nothing.
constexpr auto kSpin = std::chrono::microseconds(100);

int cgroup_quota() {
  int cpus = 1 << 20;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    long long quota = 0, period = 0;
    if (std::fscanf(f, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0)
      cpus = static_cast<int>((quota + period - 1) / period);
    std::fclose(f);
  }
  return cpus;
}

// One pool a process: the CPUs are the process's. Callers on several threads take turns (a caller that finds the pool
// busy runs its own tasks alone), so engines in one process never oversubscribe the machine through it.
class Pool {
 public:
  // Never destroyed: helpers may outlive static destructors. A forked child has none of the helpers, and locks that were held
  // at the fork stay so: it gets a pool of its own.
  static Pool& get() {
    return *instance();
  }

  void run(int threads, int64_t n, TaskFn fn, void* context) {
    if (threads <= 1 || n <= 1 || !owner_.try_lock()) {
      for (int64_t i = 0; i < n; ++i) fn(context, i);
      return;
    }
    std::lock_guard<std::mutex> hold(owner_, std::adopt_lock);
    int wanted = static_cast<int>(std::min<int64_t>({threads, n, kMostThreads})) - 1;
    try {
      while (helpers_ < wanted) {
        spawn(helpers_);
        ++helpers_;
      }
    } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
      wanted = helpers_;
    }
    fn_ = fn;
    context_ = context;
    total_ = n;
    next_.store(0, std::memory_order_relaxed);
    active_.store(wanted, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ticket_.store((ticket_.load(std::memory_order_relaxed) & ~kWantedMask) + kWantedMask + 1 + wanted, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    work();
    while (active_.load(std::memory_order_acquire) != 0) UMA_PAUSE();
  }

 private:
  static constexpr int64_t kMostThreads = 256;

  static Pool*& instance() {
    static Pool* pool = [] {
      pthread_atfork(nullptr, nullptr, [] { instance() = new Pool; });
      return new Pool;
    }();
    return pool;
  }

  void spawn(int index) {
    const uint64_t seen = ticket_.load();
    std::thread([this, index, seen] { loop(index, seen); }).detach();
  }

  void work() {
    const int64_t n = total_;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) fn_(context_, i);
  }

  void loop(int index, uint64_t seen) {
    for (;;) {
      const auto give_up = std::chrono::steady_clock::now() + kSpin;
      while (ticket_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 64 && ticket_.load(std::memory_order_acquire) == seen; ++i) UMA_PAUSE();
        if (std::chrono::steady_clock::now() < give_up) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_acquire) != seen; });
        sleeping_.fetch_sub(1);
      }
      seen = ticket_.load(std::memory_order_acquire);
      if (index < static_cast<int>(seen & kWantedMask)) {
        work();
        active_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_;
  // Number of the job in the high bits, helpers it wants in the low ones: read together, so that a helper that was not
  // wanted and wakes late can never mistake a job that is being set up for its own.
  static constexpr uint64_t kWantedMask = 0xffff;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> active_{0};
  std::atomic<int64_t> next_{0};
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t total_ = 0;
  int helpers_ = 0;
};

int default_threads() {
  if (const char* text = std::getenv("UMA_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1) return n;
  }
  return hardware_threads();
}

thread_local int t_threads = 0;

}  // namespace

int hardware_threads() {
#ifdef __linux__
  cpu_set_t set;
  int cpus = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(std::thread::hardware_concurrency());
#else
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
#endif
  return std::max(1, std::min(cpus, cgroup_quota()));
}

void set_num_threads(int n) { t_threads = std::max(1, n); }

int get_num_threads() {
  if (t_threads == 0) t_threads = default_threads();
  return t_threads;
}

void run_tasks(int64_t n, TaskFn fn, void* context) { Pool::get().run(get_num_threads(), n, fn, context); }

}  // namespace uma
