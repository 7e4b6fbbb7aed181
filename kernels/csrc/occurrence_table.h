// The table of the n-grams of one order: how often each occurs in the responses of its group.
//
// Of n-gram g only two counts matter, the largest of any response, and the second largest (with multiplicity):
//
//   min(c_i(g), largest count of g in the other responses) = min(c_i(g), second(g))   for every response i
//
// If i holds the largest count, the best other one is the second. If not, c_i <= second, and the best other one is at
// least that. So the matches of response i are the sum of min(c_i(g), second(g)), and with responses taken one after
// another they can be counted as the counts grow. When the count of g in response i becomes k:
//
//   k <= second             one match more for i
//   second < k <= largest   i takes the second place, at k = second + 1: one match more for i, and for the holder of
//                           the largest count (which is not i, whose count was k - 1 until now)
//   largest < k             i takes the first place. It held or shared it at k - 1, so second stays as it is
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace mmr1 {

// A position of a group, and the n-gram that begins there.
struct Record {
  std::uint32_t position;
  std::uint32_t id;  // of the order that was counted last; before the first one, the token
};

// Spreads the 64 bits of a key over all bits of the hash (the finaliser of MurmurHash3, a bijection). Ids and tokens
// are small numbers in rows and strides, in which weaker mixtures show: one multiplication, its halves folded, counts
// 5 % faster on random text, but put consecutive ids so close together that a search took 37 steps in place of 1.5.
inline std::uint64_t mixed(std::uint64_t key) {
  key ^= key >> 33;
  key *= 0xff51afd7ed558ccdULL;
  key ^= key >> 33;
  key *= 0xc4ceb9fe1a85ec53ULL;
  return key ^ (key >> 33);
}

// Open addressing over slots that name entries; entries lie in the order of their first occurrence. A table is reset
// without touching its slots: serial numbers only rise, and those of earlier uses count as empty.
class OccurrenceTable {
 public:
  static constexpr std::size_t kBlock = 32;  // n-grams looked up at a time, so that their cache misses overlap

  // Forgets all n-grams and makes room for this many; more of them make it grow.
  void reset(std::size_t expected) {
    first_serial_ += static_cast<std::uint32_t>(size_);
    size_ = 0;
    std::size_t num_slots = kFewestSlots;
    while (num_slots < 2 * expected) num_slots *= 2;
    use_slots(num_slots);
  }

  std::size_t size() const { return size_; }

  // Room for so many more n-grams. The table stays at most half full, so that a search ends after a slot or two.
  void make_room(std::size_t more) {
    if (2 * (size_ + more) > mask_ + 1) use_slots(2 * (mask_ + 1));
  }

  // Fetches into the cache where an n-gram of this hash would be.
  void prefetch(std::uint64_t hash) const { __builtin_prefetch(&slots_[hash & mask_], 1); }

  // Counts `num_keys` n-grams of `response`, for which there must be room, and gives each record the id of its own,
  // below size(). Responses must never fall from call to call. `matches` is that of response 0, the next response's
  // lies `stride` further.
  void add(const std::uint64_t* keys, const std::uint64_t* hashes, std::size_t num_keys, std::uint32_t response,
           std::int64_t* matches, std::size_t stride, Record* records) {
    std::uint32_t* const slots = slots_.data();  // in variables of this function, which no store in it can change
    Entry* const entries = entries_.get();
    std::uint8_t* const repeated = repeated_.get();
    const std::size_t mask = mask_;
    const std::uint32_t first_serial = first_serial_;
    std::size_t size = size_;
    std::int64_t own_matches = 0;
    for (std::size_t key = 0; key < num_keys; ++key) {
      for (std::size_t at = hashes[key] & mask;; at = (at + 1) & mask) {
        const std::uint32_t serial = slots[at];
        if (serial < first_serial) {
          const auto id = static_cast<std::uint32_t>(size++);
          slots[at] = first_serial + id;
          entries[id] = {keys[key], response, 1, 1, response, 0};
          repeated[id] = 0;
          records[key].id = id;
          break;
        }
        const std::uint32_t id = serial - first_serial;
        if (entries[id].key == keys[key]) {
          own_matches += again(entries[id], response, matches, stride);
          repeated[id] = 1;
          records[key].id = id;
          break;
        }
      }
    }
    size_ = size;
    matches[response * stride] += own_matches;
  }

  // 1 if the n-gram occurred more than once, else 0.
  std::uint8_t repeated(std::uint32_t id) const { return repeated_[id]; }

  // For tests: the next serial number, so that they can reach the largest one.
  void set_first_serial(std::uint32_t serial) { first_serial_ = serial; }

 private:
  struct Entry {
    std::uint64_t key;
    std::uint32_t response, count;  // of the latest response that has it
    std::uint32_t largest, owner;   // the largest count, and the first response that reached it
    std::uint32_t second;
  };
  static constexpr std::size_t kFewestSlots = 2 * kBlock;
  static constexpr std::uint32_t kLastSerial = UINT32_MAX;

  // One occurrence more. Returns: 1 if it matches, else 0. Without branches: which of the three cases comes next cannot
  // be predicted.
  static std::int64_t again(Entry& entry, std::uint32_t response, std::int64_t* matches, std::size_t stride) {
    const std::uint32_t same_response = entry.response == response;
    const std::uint32_t count = 1 + (entry.count & (0 - same_response));
    const std::uint32_t matched = count <= entry.largest;
    const std::uint32_t lifts_second = matched & static_cast<std::uint32_t>(count > entry.second);
    matches[entry.owner * stride] += lifts_second;
    entry.response = response;
    entry.count = count;
    entry.second += lifts_second;
    entry.largest += 1 - matched;
    entry.owner ^= (entry.owner ^ response) & (matched - 1);
    return matched;
  }

  std::size_t free_slot(std::uint64_t hash) const {
    std::size_t at = hash & mask_;
    while (slots_[at] >= first_serial_) at = (at + 1) & mask_;
    return at;
  }

  // Spreads the entries over this many slots.
  void use_slots(std::size_t num_slots) {
    if (slots_.size() < num_slots) {
      // Not initialised, so that memory is touched only as far as there are entries.
      std::unique_ptr<Entry[]> entries(new Entry[num_slots / 2]);
      std::unique_ptr<std::uint8_t[]> repeated(new std::uint8_t[num_slots / 2]);
      slots_.resize(num_slots, 0);
      std::copy_n(entries_.get(), size_, entries.get());  // from here on nothing can fail
      std::copy_n(repeated_.get(), size_, repeated.get());
      entries_ = std::move(entries);
      repeated_ = std::move(repeated);
    }
    mask_ = num_slots - 1;
    const std::uint64_t next_serial = std::uint64_t{first_serial_} + size_;
    if (next_serial + num_slots > kLastSerial) {
      std::fill(slots_.begin(), slots_.end(), 0);
      first_serial_ = 1;
    } else {
      first_serial_ = static_cast<std::uint32_t>(next_serial);
    }
    for (std::size_t id = 0; id < size_; ++id) {
      const std::uint64_t hash = mixed(entries_[id].key);
      const auto serial = first_serial_ + static_cast<std::uint32_t>(id);
      slots_[free_slot(hash)] = serial;
    }
  }

  std::vector<std::uint32_t> slots_;  // serial numbers of entries: first_serial_ + id; smaller ones are empty
  std::unique_ptr<Entry[]> entries_;
  std::unique_ptr<std::uint8_t[]> repeated_;
  std::size_t size_ = 0;
  std::size_t mask_ = 0;
  std::uint32_t first_serial_ = 1;
};

}  // namespace mmr1
