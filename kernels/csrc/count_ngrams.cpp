// The C interface of the counter, and how the groups of a batch are shared out over threads.
//
// Groups are counted side by side, the largest first. A group that alone has more than a thread's fair share of what is
// left is counted by all threads together, by buckets of the first tokens of its n-grams: all n-grams of a position
// lie in one bucket, so that threads only meet where their sums are added up. Counts are integers, so neither the
// number of threads nor their order shows in the result.
#include <atomic>
#include <memory>
#include <numeric>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "ngram_counter.h"

namespace mmr1 {
namespace {

enum Status : std::int32_t { kDone = 0, kOutOfMemory = 1 };

struct Batch {
  const std::int32_t* token_ids;
  const std::int64_t* offsets;
  const std::int64_t* group_offsets;
  std::size_t max_order;
  std::size_t max_undivided;
  std::int64_t* matches;
  std::int64_t* distinct;

  Group group(std::size_t index) const {
    const std::int64_t* bounds = offsets + group_offsets[index];
    return {token_ids + bounds[0], bounds, static_cast<std::size_t>(group_offsets[index + 1] - group_offsets[index])};
  }
  Counts counts(std::size_t index) const {
    return {matches + static_cast<std::size_t>(group_offsets[index]) * max_order, distinct + index * max_order};
  }
};

// Kept from call to call, a few megabytes a thread.
NgramCounter& counter_of_thread(const Batch& batch) {
  static thread_local NgramCounter counter;
  counter.configure(batch.max_order, batch.max_undivided);
  return counter;
}

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// All n-grams of each order, however often they occur: what the counter then lowers by those that repeat another one.
void count_all(const Group& group, std::size_t max_order, std::int64_t* distinct) {
  for (std::size_t response = 0; response < group.num_responses; ++response) {
    const std::size_t length = group.end(response) - group.start(response);
    for (std::size_t order = 1; order <= std::min(length, max_order); ++order) {
      distinct[order - 1] += static_cast<std::int64_t>(length - order + 1);
    }
  }
}

// Buckets of one group, and sums of its own for each thread. Throws: std::bad_alloc.
class SharedGroup {
 public:
  SharedGroup(const Batch& batch, std::size_t index, std::size_t num_threads)
      : batch_(batch),
        group_(batch.group(index)),
        counts_(batch.counts(index)),
        size_(group_.num_tokens()),
        num_threads_(num_threads),
        buckets_in_all_(num_buckets_for(size_, batch.max_undivided)) {
    // A few buckets for each thread, so that unequal ones even out.
    if (num_threads > 1) while (buckets_in_all_ < 8 * num_threads) buckets_in_all_ *= 2;
    num_buckets_ = std::min(buckets_in_all_, kMostBuckets);
    records_.reset(new Record[size_]);
    spare_.reset(new Record[size_]);
    next_.resize(num_threads * num_buckets_);
    starts_.resize(num_buckets_ + 1);
    order_.resize(num_buckets_);
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    if (num_threads > 1) {
      sums_.resize(num_threads);
      for (auto& sum : sums_) sum.resize((group_.num_responses + 1) * batch.max_order);
    }
  }

  // Called by each thread, between barriers. Slices are equal parts of the positions.
  void count_slice(std::size_t slice) {
    std::size_t sizes[kMostBuckets] = {};
    const std::size_t end = slice_start(slice + 1), num_buckets = num_buckets_;
    const Group group = group_;
    for (std::size_t at = slice_start(slice); at < end; ++at) ++sizes[bucket_at(group, at, num_buckets)];
    std::copy(sizes, sizes + num_buckets, next_.data() + slice * num_buckets);
  }

  void place_buckets() {
    std::size_t start = 0;
    for (std::size_t bucket = 0; bucket < num_buckets_; ++bucket) {
      starts_[bucket] = start;
      for (std::size_t slice = 0; slice < num_threads_; ++slice) {
        const std::size_t size = next_[slice * num_buckets_ + bucket];
        next_[slice * num_buckets_ + bucket] = start;
        start += size;
      }
    }
    starts_[num_buckets_] = start;
    std::sort(order_.begin(), order_.end(), [&](std::size_t left, std::size_t right) {
      return starts_[left + 1] - starts_[left] > starts_[right + 1] - starts_[right];
    });
  }

  void fill_slice(std::size_t slice) {
    std::size_t next[kMostBuckets];
    const std::size_t end = slice_start(slice + 1), num_buckets = num_buckets_;
    std::copy_n(next_.data() + slice * num_buckets, num_buckets, next);
    const Group group = group_;
    Record* const records = records_.get();
    for (std::size_t at = slice_start(slice); at < end; ++at) {
      records[next[bucket_at(group, at, num_buckets)]++] = first_record(group, at);
    }
  }

  std::size_t num_buckets() const { return num_buckets_; }

  // The bucket at this place of the list of buckets from large to small.
  void count_bucket(std::size_t place, std::size_t thread) {
    const std::size_t start = starts_[order_[place]], end = starts_[order_[place] + 1];
    Counts counts = counts_;
    if (num_threads_ > 1) {
      counts.distinct = sums_[thread].data();
      counts.matches = counts.distinct + batch_.max_order;
    }
    counter_of_thread(batch_).count_share(group_, records_.get() + start, spare_.get() + start, end - start, 1,
                                          buckets_in_all_ / num_buckets_, kBitsOfBucket, counts);
  }

  void add_up() {
    for (const auto& sum : sums_) {
      for (std::size_t at = 0; at < batch_.max_order; ++at) counts_.distinct[at] += sum[at];
      for (std::size_t at = batch_.max_order; at < sum.size(); ++at) counts_.matches[at - batch_.max_order] += sum[at];
    }
  }

 private:
  std::size_t slice_start(std::size_t slice) const { return size_ * slice / num_threads_; }
  static std::size_t bucket_at(const Group& group, std::size_t at, std::size_t num_buckets) {
    return bucket_of(mixed(static_cast<std::uint32_t>(group.tokens[at])), 0, num_buckets);
  }

  const Batch& batch_;
  Group group_;
  Counts counts_;
  std::size_t size_, num_threads_, buckets_in_all_, num_buckets_;
  std::unique_ptr<Record[]> records_, spare_;
  std::vector<std::size_t> next_, starts_, order_;
  std::vector<std::vector<std::int64_t>> sums_;
};

void count_by_all_threads(const Batch& batch, std::size_t index, int num_threads, std::atomic<bool>& failed) try {
  SharedGroup shared(batch, index, static_cast<std::size_t>(num_threads));
  const auto num_buckets = static_cast<std::int64_t>(shared.num_buckets());
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static, 1)
    for (int slice = 0; slice < num_threads; ++slice) shared.count_slice(static_cast<std::size_t>(slice));
#pragma omp single
    shared.place_buckets();
#pragma omp for schedule(static, 1)
    for (int slice = 0; slice < num_threads; ++slice) shared.fill_slice(static_cast<std::size_t>(slice));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t place = 0; place < num_buckets; ++place) {
      try {
        shared.count_bucket(static_cast<std::size_t>(place), static_cast<std::size_t>(thread_index()));
      } catch (...) {
        failed = true;
      }
    }
  }
  shared.add_up();
} catch (...) {
  failed = true;
}

void count_by_one_thread(const Batch& batch, std::size_t index, std::atomic<bool>& failed) try {
  const Group group = batch.group(index);
  if (group.num_tokens() <= batch.max_undivided) {
    counter_of_thread(batch).count_whole(group, batch.counts(index));
    return;
  }
  SharedGroup shared(batch, index, 1);
  shared.count_slice(0);
  shared.place_buckets();
  shared.fill_slice(0);
  for (std::size_t place = 0; place < shared.num_buckets(); ++place) shared.count_bucket(place, 0);
} catch (...) {
  failed = true;
}

Status count(const Batch& batch, std::size_t num_groups, int num_threads) {
  std::vector<std::size_t> sizes(num_groups), order(num_groups);
  std::size_t left = 0;
  for (std::size_t index = 0; index < num_groups; ++index) {
    left += sizes[index] = batch.group(index).num_tokens();
    count_all(batch.group(index), batch.max_order, batch.distinct + index * batch.max_order);
  }
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return sizes[a] > sizes[b]; });
  // A thread without a hundred microseconds of work costs more than it brings.
  const std::size_t worth_a_thread = batch.max_undivided / 16 + 1;
  const auto limited = [&](int threads, std::size_t limit) {
    return static_cast<int>(std::min(static_cast<std::size_t>(threads), limit));
  };
  num_threads = limited(num_threads, left / worth_a_thread + 1);

  std::atomic<bool> failed{false};
  std::size_t first = 0;
  for (; num_threads > 1 && first < num_groups; ++first) {
    const std::size_t index = order[first], size = sizes[index];
    if (size <= 2 * worth_a_thread || size * static_cast<std::size_t>(num_threads) <= left) break;
    // Sums of its own for each thread, but no more than 8 bytes a token of them.
    const std::size_t cells = (batch.group(index).num_responses + 1) * batch.max_order;
    const int team = limited(num_threads, std::min(size / cells, size / worth_a_thread));
    if (team < 2) break;
    count_by_all_threads(batch, index, team, failed);
    left -= size;
  }
  if (num_threads == 1) {
    for (std::size_t place = 0; place < num_groups; ++place) count_by_one_thread(batch, order[place], failed);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (auto place = static_cast<std::int64_t>(first); place < static_cast<std::int64_t>(num_groups); ++place) {
      count_by_one_thread(batch, order[static_cast<std::size_t>(place)], failed);
    }
  }
  return failed ? kOutOfMemory : kDone;
}

}  // namespace
}  // namespace mmr1

// Counts the n-grams of a batch; `mmr1_kernels.reference.count_ngrams` says what. Expects checked input, groups of
// fewer than 2^31 tokens and arrays of zeros, matches (responses, max_order) and distinct (groups, max_order).
// num_threads: 0 = as many as OpenMP would take. max_undivided: longest list counted without division, at least 2.
// Returns: 0, or 1 where memory ran out; the arrays then hold nothing of use.
extern "C" __attribute__((visibility("default"))) std::int32_t mmr1_count_ngrams_1(
    const std::int32_t* token_ids, const std::int64_t* offsets, const std::int64_t* group_offsets,
    std::int64_t num_groups, std::int64_t max_order, std::int32_t num_threads, std::int64_t max_undivided,
    std::int64_t* matches, std::int64_t* distinct) noexcept try {
#ifdef _OPENMP
  if (num_threads == 0) num_threads = omp_get_max_threads();
#else
  num_threads = 1;
#endif
  const mmr1::Batch batch{token_ids, offsets, group_offsets, static_cast<std::size_t>(max_order),
                          static_cast<std::size_t>(max_undivided), matches, distinct};
  return mmr1::count(batch, static_cast<std::size_t>(num_groups), num_threads);
} catch (...) {
  return mmr1::kOutOfMemory;
}
