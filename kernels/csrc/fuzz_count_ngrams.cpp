// Random and adversarial batches against the definition of the counts, for a run under sanitizers (`make sanitize`).
//
//   fuzz_count_ngrams NUM_SMALL NUM_LARGE SEED
//
// Every input is counted with several numbers of threads and limits of division, so that tiny ones reach the divisions,
// the shares and the growth of the table too; every result must equal the definition, computed with maps of whole
// n-grams, each response against each other one. Prints how many inputs passed; exits with 1 at the first that fails.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "count_ngrams.cpp"

namespace {

using Random = std::mt19937_64;
using Tokens = std::vector<std::int32_t>;
using Groups = std::vector<std::vector<Tokens>>;

struct Result {
  std::vector<std::int64_t> matches, distinct;
  bool operator==(const Result& other) const { return matches == other.matches && distinct == other.distinct; }
};

std::size_t below(Random& random, std::size_t limit) { return limit ? random() % limit : 0; }

std::size_t one_of(Random& random, std::initializer_list<std::size_t> values) {
  return values.begin()[below(random, values.size())];
}

// By the definition: sum over the n-grams of response i of min(count in i, largest count in another response).
Result defined(const Groups& groups, std::size_t max_order) {
  Result result;
  for (const auto& group : groups) {
    const std::size_t first_row = result.matches.size();
    result.matches.resize(first_row + group.size() * max_order);
    for (std::size_t order = 1; order <= max_order; ++order) {
      std::vector<std::map<Tokens, std::int64_t>> counts(group.size());
      std::map<Tokens, bool> different;
      for (std::size_t i = 0; i < group.size(); ++i) {
        for (std::size_t at = 0; at + order <= group[i].size(); ++at) {
          const auto start = group[i].begin() + static_cast<std::ptrdiff_t>(at);
          const Tokens ngram(start, start + static_cast<std::ptrdiff_t>(order));
          ++counts[i][ngram];
          different[ngram] = true;
        }
      }
      for (std::size_t i = 0; i < group.size(); ++i) {
        for (const auto& [ngram, count] : counts[i]) {
          std::int64_t best = 0;
          for (std::size_t j = 0; j < group.size(); ++j) {
            const auto found = counts[j].find(ngram);
            if (j != i && found != counts[j].end()) best = std::max(best, found->second);
          }
          result.matches[first_row + i * max_order + order - 1] += std::min(count, best);
        }
      }
      result.distinct.push_back(static_cast<std::int64_t>(different.size()));
    }
  }
  return result;
}

Result counted(const Groups& groups, std::size_t max_order, int num_threads, std::size_t max_undivided) {
  Tokens token_ids;
  std::vector<std::int64_t> offsets{0}, group_offsets{0};
  for (const auto& group : groups) {
    for (const auto& response : group) {
      token_ids.insert(token_ids.end(), response.begin(), response.end());
      offsets.push_back(static_cast<std::int64_t>(token_ids.size()));
    }
    group_offsets.push_back(static_cast<std::int64_t>(offsets.size()) - 1);
  }
  // Exact copies on the heap, so that a read past the end is seen.
  const std::unique_ptr<std::int32_t[]> exact(new std::int32_t[token_ids.size()]);
  std::copy(token_ids.begin(), token_ids.end(), exact.get());
  Result result;
  result.matches.resize((offsets.size() - 1) * max_order);
  result.distinct.resize(groups.size() * max_order);
  const std::int32_t status = mmr1_count_ngrams_1(
      exact.get(), offsets.data(), group_offsets.data(), static_cast<std::int64_t>(groups.size()),
      static_cast<std::int64_t>(max_order), num_threads, static_cast<std::int64_t>(max_undivided),
      result.matches.data(), result.distinct.data());
  if (status != 0) std::abort();
  return result;
}

// One response: noise, one token, a short period, runs, an ascent, or an earlier response with a few changes.
Tokens response_like(Random& random, const std::vector<Tokens>& earlier, std::size_t length, std::size_t alphabet,
                     std::size_t stride) {
  const auto token = [&](std::size_t value) { return static_cast<std::int32_t>(value % alphabet * stride); };
  Tokens response(length);
  const std::size_t kind = below(random, 6), start = below(random, alphabet);
  const std::size_t period = 1 + below(random, 5);
  for (std::size_t at = 0; at < length; ++at) {
    switch (kind) {
      case 0: response[at] = token(start); break;
      case 1: response[at] = token(start + at % period); break;
      case 2: response[at] = token(start + at / period); break;
      case 3: response[at] = token(start + at); break;
      default: response[at] = token(below(random, alphabet));
    }
  }
  if (!earlier.empty() && below(random, 2)) {
    const Tokens& source = earlier[below(random, earlier.size())];
    std::copy_n(source.begin(), std::min(length, source.size()), response.begin());
    for (std::size_t change = below(random, 4); change > 0 && length > 0; --change) {
      response[below(random, length)] = token(below(random, alphabet));
    }
  }
  return response;
}

Groups small_input(Random& random) {
  Groups groups(below(random, 5));
  const std::size_t alphabet = one_of(random, {1, 2, 3, 5, 17, 1000});
  // Ids far apart, and in patterns that a weak hash would put into one place.
  const std::size_t stride = one_of(random, {1, 1, 2, 1u << 16, 2'147'483'647 / alphabet});
  const std::size_t longest = one_of(random, {0, 1, 2, 4, 12, 40});
  for (auto& group : groups) {
    const std::size_t size = 1 + below(random, 6);
    for (std::size_t i = 0; i < size; ++i) {
      group.push_back(response_like(random, group, below(random, longest + 1), alphabet, stride));
    }
  }
  return groups;
}

// Enough tokens for divisions within divisions; the definition costs too much, so the whole count is the oracle.
Groups large_input(Random& random) {
  Groups groups(1 + below(random, 3));
  const std::size_t alphabet = one_of(random, {1, 2, 50, 5000, 200'000});
  const std::size_t stride = one_of(random, {1, 1024, 2'147'483'647 / alphabet});
  for (auto& group : groups) {
    const std::size_t size = one_of(random, {1, 2, 8, 64}), longest = 20'000 / size;
    for (std::size_t i = 0; i < size; ++i) {
      group.push_back(response_like(random, group, below(random, longest), alphabet, stride));
    }
  }
  return groups;
}

[[noreturn]] void fail(const char* what, std::uint64_t seed, int num_threads, std::size_t max_undivided) {
  std::printf("%s input of seed %llu: threads %d, undivided up to %zu: counts differ\n", what,
              static_cast<unsigned long long>(seed), num_threads, max_undivided);
  std::exit(1);
}

void check_small(std::uint64_t seed) {
  Random random(seed);
  const Groups groups = small_input(random);
  const std::size_t max_order = 1 + below(random, 5);
  const Result expected = defined(groups, max_order);
  if (!(counted(groups, max_order, 1, 1 << 15) == expected)) fail("small", seed, 1, 1 << 15);
  const int num_threads = static_cast<int>(1 + below(random, 4));
  const std::size_t max_undivided = one_of(random, {2, 3, 4, 9, 40});
  if (!(counted(groups, max_order, num_threads, max_undivided) == expected)) {
    fail("small", seed, num_threads, max_undivided);
  }
}

void check_large(std::uint64_t seed) {
  Random random(seed);
  const Groups groups = large_input(random);
  const std::size_t max_order = one_of(random, {1, 3, 4, 300});
  const Result expected = counted(groups, max_order, 1, std::size_t{1} << 24);
  for (const std::size_t max_undivided : {std::size_t{2}, std::size_t{64}, std::size_t{4096}}) {
    const int num_threads = static_cast<int>(1 + below(random, 4));
    if (!(counted(groups, max_order, num_threads, max_undivided) == expected)) {
      fail("large", seed, num_threads, max_undivided);
    }
  }
}

// The serial numbers of the table run out: rare in use, so they start near their end here.
void check_serials(std::uint64_t seed) {
  Random random(seed);
  mmr1::OccurrenceTable table;
  table.set_first_serial(UINT32_MAX - static_cast<std::uint32_t>(below(random, 2000)));
  for (int use = 0; use < 4; ++use) {
    table.reset(below(random, 200));
    std::map<std::uint64_t, std::uint32_t> ids;
    std::int64_t matches = 0;
    const std::size_t num_keys = below(random, 1000), alphabet = 1 + below(random, 600);
    for (std::size_t at = 0; at < num_keys; ++at) {
      const std::uint64_t key = below(random, alphabet), hash = mmr1::mixed(key);
      mmr1::Record record{0, 0};
      table.make_room(1);
      table.add(&key, &hash, 1, 0, &matches, 1, &record);
      const auto next = static_cast<std::uint32_t>(ids.size());
      if (ids.emplace(key, next).first->second != record.id || table.size() != ids.size()) fail("table", seed, 1, 0);
    }
    if (matches != 0) fail("table", seed, 1, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fputs("usage: fuzz_count_ngrams NUM_SMALL NUM_LARGE SEED\n", stderr);
    return 2;
  }
  const std::uint64_t num_small = std::strtoull(argv[1], nullptr, 10), num_large = std::strtoull(argv[2], nullptr, 10);
  const std::uint64_t seed = std::strtoull(argv[3], nullptr, 10);
  for (std::uint64_t at = 0; at < num_small; ++at) check_small(seed + at);
  for (std::uint64_t at = 0; at < num_large; ++at) check_large(seed + at);
  const std::uint64_t num_tables = num_small / 100 + 1;
  for (std::uint64_t at = 0; at < num_tables; ++at) check_serials(seed + at);
  const auto count = [](std::uint64_t number) { return static_cast<unsigned long long>(number); };
  std::printf("%llu small inputs, %llu large inputs and %llu tables passed\n", count(num_small), count(num_large),
              count(num_tables));
  return 0;
}
