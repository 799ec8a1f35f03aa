#include "static_shared_memory.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

// Set by shared_memory.ld.
extern "C" uint64_t cuda_shared_memory_begin[], cuda_shared_memory_end[];

namespace cuda_on_cpu {
namespace {

struct Symbol {
  uint64_t address = 0;
  uint64_t bytes = 0;  // 0: not given
  std::string name;
};

std::string path_of_this_code() {
  Dl_info info;
  if (dladdr(cuda_shared_memory_begin, &info) == 0) return {};
  // A program is known by the name that it was called with, which may be no path.
  return access(info.dli_fname, R_OK) == 0 ? info.dli_fname : "/proc/self/exe";
}

// A line of `nm --print-size`: address, size, type and name; some symbols have no size.
bool parse(const char* line, Symbol& symbol) {
  unsigned long address = 0, bytes = 0;
  char digits[17] = {};
  int name = 0;
  const int fields = std::sscanf(line, "%lx %16[0-9a-f] %*c %n", &address, digits, &name);
  const bool has_size = fields == 2 && std::strlen(digits) == 16;  // shorter: it is the type
  if (has_size) {
    std::sscanf(digits, "%lx", &bytes);
  } else if (std::sscanf(line, "%lx %*c %n", &address, &name) != 1) {
    return false;
  }
  symbol = {address, bytes, line + name};
  symbol.name.erase(symbol.name.find_last_not_of('\n') + 1);
  return true;
}

// Variables inside of functions are known to no loader: `nm` of the binutils reads their names.
std::vector<Symbol> read_symbols() {
  const std::string command = "nm --demangle --print-size '" + path_of_this_code() + "'";
  std::FILE* pipe = popen(command.c_str(), "r");
  std::vector<Symbol> symbols;
  char* line = nullptr;
  size_t capacity = 0;
  while (pipe && getline(&line, &capacity, pipe) > 0) {
    Symbol symbol;
    if (parse(line, symbol)) symbols.push_back(symbol);
  }
  std::free(line);
  if (!pipe || pclose(pipe) != 0) {
    std::fprintf(stderr, "cuda_on_cpu: failed: %s\n", command.c_str());
    std::abort();
  }
  return symbols;
}

uint64_t address_of(const std::vector<Symbol>& symbols, const char* name) {
  for (const Symbol& symbol : symbols) {
    if (symbol.name == name) return symbol.address;
  }
  std::fprintf(stderr, "cuda_on_cpu: no symbol %s; was the program stripped?\n", name);
  std::abort();
}

size_t measure_largest() {
  const std::vector<Symbol> symbols = read_symbols();
  const uint64_t begin = address_of(symbols, "cuda_shared_memory_begin");
  const uint64_t end = address_of(symbols, "cuda_shared_memory_end");
  std::map<std::string, size_t> bytes_of_kernel;  // the variable's name is the last part
  for (const Symbol& symbol : symbols) {
    if (symbol.address < begin || symbol.address >= end) continue;
    bytes_of_kernel[symbol.name.substr(0, symbol.name.rfind("::"))] += symbol.bytes;
  }
  size_t largest = 0;
  for (const auto& [kernel, bytes] : bytes_of_kernel) largest = std::max(largest, bytes);
  return largest;
}

}  // namespace

// Word by word: in a sanitized program, memset would refuse the red zones between the variables.
void fill_static_shared_memory_with_nan() {
  for (volatile uint64_t* word = cuda_shared_memory_begin; word != cuda_shared_memory_end; ++word) {
    *word = ~uint64_t{0};
  }
}

bool in_static_shared_memory(const void* address) {
  return address >= cuda_shared_memory_begin && address < cuda_shared_memory_end;
}

size_t largest_static_shared_bytes() {
  static const size_t largest = measure_largest();
  return largest;
}

}  // namespace cuda_on_cpu
