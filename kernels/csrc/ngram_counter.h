// Counting the n-grams of one group, or of a share of its positions, on one thread.
//
// An n-gram is named exactly, by the pair (id of its first n - 1 tokens, last token): ids and tokens are below 2^31,
// so a key of 64 bits holds both and nothing can collide. Orders are counted one after another over the list of start
// positions, from which positions drop out as soon as their n-grams cannot match: an n-gram that occurs once in the
// group is the start of longer ones that occur once. They are different ones without a look.
//
// Where the table would outgrow the cache, the positions are first divided into buckets by the hash of their n-gram.
// All longer n-grams that begin with one n-gram stay in its bucket, so a bucket is counted to the last order on its
// own, and divided again only if the n-grams of a higher order need it. That keeps time linear in the number of
// positions, and makes the buckets of the first division the shares of several threads.
#pragma once

#include "occurrence_table.h"

namespace mmr1 {

// Consecutive responses: response r is tokens[bounds[r] - bounds[0]] up to tokens[bounds[r + 1] - bounds[0]].
struct Group {
  const std::int32_t* tokens;
  const std::int64_t* bounds;
  std::size_t num_responses;

  std::size_t num_tokens() const { return end(num_responses - 1); }
  std::size_t start(std::size_t response) const { return static_cast<std::size_t>(bounds[response] - bounds[0]); }
  std::size_t end(std::size_t response) const { return static_cast<std::size_t>(bounds[response + 1] - bounds[0]); }
};

inline Record first_record(const Group& group, std::size_t position) {
  return {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(group.tokens[position])};
}

// Where the counts go: added to matches (num_responses, max_order) and distinct (max_order).
struct Counts {
  std::int64_t* matches;
  std::int64_t* distinct;
};

constexpr std::size_t kBlock = OccurrenceTable::kBlock;
constexpr std::size_t kMostBuckets = 256;  // at a time; many more would outrun the translation of addresses
constexpr unsigned kBitsOfBucket = 8;      // log2 of it

// Into how many buckets to divide a list, a power of two; 1 if it need not be. Dividing costs a fifth of counting, so
// it begins late, with lists whose table is several times the cache of a core, but then makes parts that fit it well.
inline std::size_t num_buckets_for(std::size_t num_records, std::size_t max_undivided) {
  std::size_t buckets = 1;
  if (num_records <= max_undivided) return buckets;
  while (num_records / buckets > max_undivided / 8) buckets *= 2;
  return buckets;
}

// By the high bits of the hash, after those that served earlier divisions; the table uses the low ones.
inline std::size_t bucket_of(std::uint64_t hash, unsigned used_bits, std::size_t num_buckets) {
  return static_cast<std::size_t>((hash << used_bits >> 32) * num_buckets >> 32);
}

class NgramCounter {
 public:
  // `max_undivided`: up to so many positions are counted without division.
  void configure(std::size_t max_order, std::size_t max_undivided) {
    max_order_ = max_order;
    max_undivided_ = max_undivided;
  }

  // A whole group, undivided. Beside the n-gram, the one that begins a token later must be repeated too.
  void count_whole(const Group& group, Counts counts) {
    const std::size_t num_tokens = group.num_tokens();
    if (num_tokens == 0) return;
    if (whole_.size() < num_tokens) whole_.resize(num_tokens);
    Record* records = whole_.data();
    for (std::size_t at = 0; at < num_tokens; ++at) records[at] = first_record(group, at);
    count_order(group, records, num_tokens, 1, counts);
    if (max_order_ == 1) return;
    std::size_t size = 0;  // never ahead of `at`: the list takes the place of what was read
    for (std::size_t response = 0; response < group.num_responses; ++response) {
      for (std::size_t at = group.start(response); at + 1 < group.end(response); ++at) {
        const std::size_t kept = table_.repeated(records[at].id) & table_.repeated(records[at + 1].id);
        records[size] = {static_cast<std::uint32_t>(at), records[at].id};
        size += kept;
      }
    }
    for (std::size_t order = 2; size > 0; ++order) {
      count_order(group, records, size, order, counts);
      if (order == max_order_) return;
      std::size_t kept_size = 0;
      for (std::size_t at = 0; at + 1 < size; ++at) {
        // The record of the next position is there only if its n-gram lies in the same response.
        const std::size_t kept = (records[at + 1].position == records[at].position + 1) &
                                 table_.repeated(records[at].id) & table_.repeated(records[at + 1].id);
        records[kept_size] = records[at];
        kept_size += kept;
      }
      size = kept_size;
    }
  }

  // A share of a group: all positions, rising, whose n-gram of `order` falls into one bucket. It is divided further
  // into `buckets`, by hash bits after the first `used_bits`, then counted to the last order. No n-gram of `order` may
  // reach beyond its response. `spare` is as long as `records`; both are overwritten.
  void count_share(const Group& group, Record* records, Record* spare, std::size_t size, std::size_t order,
                   std::size_t buckets, unsigned used_bits, Counts counts) {
    while (size > 0) {
      if (buckets == 1) {
        count_order(group, records, size, order, counts);
        if (order == max_order_) return;
        size = keep_repeated(group, records, size, order);
        ++order;
        buckets = num_buckets_for(size, max_undivided_);
        used_bits = 0;
        continue;
      }
      const std::size_t num_buckets = std::min(buckets, kMostBuckets);
      std::size_t starts[kMostBuckets + 1];
      divide(group, records, spare, size, order, used_bits, num_buckets, starts);
      std::swap(records, spare);
      buckets /= num_buckets;
      used_bits += kBitsOfBucket;
      // The largest bucket last, in this very loop: the others have half of the records at most, so that calls
      // nest no deeper than the number of records has bits, whatever the text and the order.
      std::size_t largest = 0;
      for (std::size_t bucket = 1; bucket < num_buckets; ++bucket) {
        if (starts[bucket + 1] - starts[bucket] > starts[largest + 1] - starts[largest]) largest = bucket;
      }
      for (std::size_t bucket = 0; bucket < num_buckets; ++bucket) {
        if (bucket == largest) continue;
        count_share(group, records + starts[bucket], spare + starts[bucket], starts[bucket + 1] - starts[bucket],
                    order, buckets, used_bits, counts);
      }
      records += starts[largest];
      spare += starts[largest];
      size = starts[largest + 1] - starts[largest];
    }
  }

 private:
  static std::int64_t difference(std::size_t left, std::size_t right) {
    return static_cast<std::int64_t>(left) - static_cast<std::int64_t>(right);
  }

  static std::uint64_t key_of(const Group& group, Record record, std::size_t order) {
    if (order == 1) return record.id;
    return std::uint64_t{record.id} << 32 | static_cast<std::uint32_t>(group.tokens[record.position + order - 1]);
  }

  // Counts one order; the records get its ids. Each n-gram of a record must lie in one response. Not inlined: the loop
  // needs every register, and was a quarter slower as a part of its callers.
  [[gnu::noinline]] void count_order(const Group& group, Record* records, std::size_t size, std::size_t order,
                                     Counts counts) {
    table_.reset(std::min(size, max_undivided_));
    std::int64_t* matches = counts.matches + (order - 1);
    std::size_t response = 0, end = group.end(0);
    std::uint64_t keys[kBlock], hashes[kBlock];
    for (std::size_t begin = 0; begin < size; begin += kBlock) {
      Record* block = records + begin;
      const std::size_t block_size = std::min(kBlock, size - begin);
      table_.make_room(block_size);
      if (order > 1 && size - begin >= 3 * kBlock) {
        const std::int32_t* last = group.tokens + order - 1;
        for (std::size_t at = 2 * kBlock; at < 3 * kBlock; ++at) __builtin_prefetch(last + block[at].position);
      }
      for (std::size_t at = 0; at < block_size; ++at) {
        keys[at] = key_of(group, block[at], order);
        hashes[at] = mixed(keys[at]);
        table_.prefetch(hashes[at]);
      }
      for (std::size_t at = 0; at < block_size;) {
        if (block[at].position >= end) {
          response = response_of(group, block[at].position, response + 1);
          end = group.end(response);
        }
        std::size_t stop = block_size;  // of the records of this response
        if (block[stop - 1].position >= end) {
          for (stop = at + 1; block[stop].position < end;) ++stop;
        }
        table_.add(keys + at, hashes + at, stop - at, static_cast<std::uint32_t>(response), matches, max_order_,
                   block + at);
        at = stop;
      }
    }
    counts.distinct[order - 1] += difference(table_.size(), size);
  }

  // Keeps the records whose n-grams are repeated and can be longer by a token. Returns: how many.
  std::size_t keep_repeated(const Group& group, Record* records, std::size_t size, std::size_t order) const {
    std::size_t kept_size = 0, response = 0, end = group.end(0);
    for (std::size_t at = 0; at < size; ++at) {
      const Record record = records[at];
      if (record.position >= end) {
        response = response_of(group, record.position, response + 1);
        end = group.end(response);
      }
      records[kept_size] = record;
      kept_size += static_cast<std::size_t>(record.position + order < end) & table_.repeated(record.id);
    }
    return kept_size;
  }

  // The first response at or after `response` that ends beyond `position`: in doubling steps, then by halving.
  static std::size_t response_of(const Group& group, std::size_t position, std::size_t response) {
    std::size_t step = 1;
    while (response + step < group.num_responses && group.end(response + step - 1) <= position) {
      response += step;
      step *= 2;
    }
    const std::int64_t* first = group.bounds + response + 1;
    const std::int64_t* last = group.bounds + std::min(response + step, group.num_responses) + 1;
    const auto bound = group.bounds[0] + static_cast<std::int64_t>(position);
    return static_cast<std::size_t>(std::upper_bound(first, last, bound) - group.bounds) - 1;
  }

  // Copies the records into their buckets, in the same order; bucket b gets starts[b] up to starts[b + 1].
  static void divide(const Group& group, const Record* records, Record* buckets, std::size_t size, std::size_t order,
                     unsigned used_bits, std::size_t num_buckets, std::size_t* starts) {
    std::size_t next[kMostBuckets] = {};
    const auto bucket_at = [&](std::size_t at) {
      return bucket_of(mixed(key_of(group, records[at], order)), used_bits, num_buckets);
    };
    for (std::size_t at = 0; at < size; ++at) ++next[bucket_at(at)];
    std::size_t start = 0;
    for (std::size_t bucket = 0; bucket < num_buckets; ++bucket) {
      starts[bucket] = start;
      start += next[bucket];
      next[bucket] = starts[bucket];
    }
    starts[num_buckets] = start;
    for (std::size_t at = 0; at < size; ++at) buckets[next[bucket_at(at)]++] = records[at];
  }

  OccurrenceTable table_;
  std::vector<Record> whole_;
  std::size_t max_order_ = 0;
  std::size_t max_undivided_ = 0;
};

}  // namespace mmr1
