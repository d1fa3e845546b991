// Reads the headers of a tar archive (ustar, GNU long names and base-256 numbers, PAX path and size)
// and nothing of its data. An archive that ends too soon gives its whole members and the reason.
#include "tar_index.h"

#include <fcntl.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace vlpfast {
namespace {

constexpr int64_t kBlock = 512;
// A PAX or long-name body larger than this is not a name: the archive is damaged.
constexpr int64_t kMaxExtendedHeader = 1 << 20;

struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class File {
 public:
  explicit File(const char* path) : fd_(::open(path, O_RDONLY | O_CLOEXEC)) {
    struct stat info {};
    if (fd_ < 0 || ::fstat(fd_, &info) != 0) {
      error_ = errno;
      return;
    }
    size_ = info.st_size;
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int error() const { return error_; }
  int64_t size() const { return size_; }

  // Reads [offset, offset + n), which the caller has checked to lie in the file.
  void read(void* out, int64_t n, int64_t offset) const {
    auto* bytes = static_cast<char*>(out);
    while (n > 0) {
      const ssize_t got = ::pread(fd_, bytes, n, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw Damaged("cannot read at byte " + std::to_string(offset));
      bytes += got, n -= got, offset += got;
    }
  }

 private:
  int fd_;
  int error_ = 0;
  int64_t size_ = 0;
};

using Block = std::array<char, kBlock>;

std::string_view text(const Block& block, size_t at, size_t n) {
  return {block.data() + at, strnlen(block.data() + at, n)};
}

// Octal digits, or base 256 where the top bit of the first byte is set (GNU, sizes of 8 GiB and
// up); -1 where it is neither.
int64_t number(const Block& block, size_t at, size_t n) {
  const auto* field = reinterpret_cast<const unsigned char*>(block.data()) + at;
  int64_t value = 0;
  if (field[0] & 0x80) {
    for (size_t i = 0; i < n; ++i) {
      if (value >> 55) return -1;
      value = (value << 8) | (i == 0 ? field[0] & 0x7F : field[i]);
    }
    return value;
  }
  size_t i = 0;
  while (i < n && field[i] == ' ') ++i;
  for (; i < n && field[i] != ' ' && field[i] != '\0'; ++i) {
    if (field[i] < '0' || field[i] > '7') return -1;
    value = (value << 3) | (field[i] - '0');
  }
  return value;
}

bool checksum_fits(const Block& block) {
  constexpr size_t kAt = 148, kLen = 8;
  int64_t plain = 0, with_sign = 0;  // old writers summed signed bytes
  for (size_t i = 0; i < block.size(); ++i) {
    const char c = kAt <= i && i < kAt + kLen ? ' ' : block[i];
    plain += static_cast<unsigned char>(c);
    with_sign += static_cast<signed char>(c);
  }
  const int64_t stored = number(block, kAt, kLen);
  return stored == plain || stored == with_sign;
}

// PAX records: "<length> <key>=<value>\n", the length counting all of itself.
void parse_pax(std::string_view body, std::map<std::string, std::string>& out) {
  while (!body.empty() && body.front() != '\0') {
    size_t length = 0;
    const auto [end, error] = std::from_chars(body.data(), body.data() + body.size(), length);
    const size_t start = end - body.data() + 1;
    if (error != std::errc() || length > body.size() || start >= length) {
      throw Damaged("bad PAX record");
    }
    const std::string_view record = body.substr(start, length - start - 1);
    const size_t equals = record.find('=');
    if (equals == std::string_view::npos) throw Damaged("bad PAX record");
    out[std::string(record.substr(0, equals))] = record.substr(equals + 1);
    body.remove_prefix(length);
  }
}

struct Index {
  std::string names;
  std::vector<int64_t> name_offsets{0}, offsets, sizes;
  std::optional<std::string> error;

  void add(std::string_view name, int64_t offset, int64_t size) {
    names += name;
    name_offsets.push_back(static_cast<int64_t>(names.size()));
    offsets.push_back(offset);
    sizes.push_back(size);
  }
};

std::string member_name(const Block& block) {
  const std::string name(text(block, 0, 100));
  const std::string_view prefix = text(block, 345, 155);
  // GNU's magic ("ustar  ") uses the prefix field for other things.
  const bool ustar = std::memcmp(block.data() + 257, "ustar\0", 6) == 0;
  return ustar && !prefix.empty() ? std::string(prefix) + "/" + name : name;
}

void scan(const File& file, Index& index) {
  std::map<std::string, std::string> globals, locals;
  std::optional<std::string> long_name;
  Block block;
  int64_t at = 0;
  const auto where = [&] { return " at byte " + std::to_string(at); };
  while (at < file.size()) {
    if (at + kBlock > file.size()) throw Damaged("truncated: the header" + where() + " is cut");
    file.read(block.data(), kBlock, at);
    if (block == Block{}) return;  // the archive's end mark
    if (!checksum_fits(block)) throw Damaged("not a tar header" + where());
    int64_t size = number(block, 124, 12);
    const char type = block[156];
    const bool extended = type == 'x' || type == 'g' || type == 'L' || type == 'K';
    std::string name = long_name.value_or(member_name(block));
    if (!extended) {
      std::map<std::string, std::string> pax = globals;
      for (auto& [key, value] : locals) pax[key] = value;
      if (pax.contains("path")) name = pax["path"];
      if (pax.contains("size")) {
        const std::string& digits = pax["size"];
        const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), size);
        if (parsed.ec != std::errc()) size = -1;
      }
      if (type == 'S' || pax.contains("GNU.sparse.major")) {
        throw Damaged("sparse member '" + name + "'" + where() + " is not supported");
      }
    }
    if (size < 0) throw Damaged("bad size of '" + name + "'" + where());
    // Links, directories and devices have no data, whatever their size field says.
    const bool regular = type == '0' || type == '\0' || type == '7';
    const int64_t data = at + kBlock;
    const int64_t length = '1' <= type && type <= '6' ? 0 : size;
    if (length > file.size() - data) {
      throw Damaged("truncated: '" + name + "' needs bytes up to " + std::to_string(data + length) +
                    ", the file ends at " + std::to_string(file.size()));
    }
    if (extended) {
      if (length > kMaxExtendedHeader) throw Damaged("extended header too long" + where());
      std::string body(length, '\0');
      file.read(body.data(), length, data);
      if (type == 'L') long_name = std::string(body.c_str());
      if (type == 'x') parse_pax(body, locals);
      if (type == 'g') parse_pax(body, globals);
    } else {
      // Old tar marks a directory by the slash alone.
      if (regular && !(type == '\0' && name.ends_with('/'))) index.add(name, data, length);
      locals.clear();
      long_name.reset();
    }
    at = data + (length + kBlock - 1) / kBlock * kBlock;
  }
}

template <class T>
py::array_t<T> to_array(const T* data, size_t n) {
  return py::array_t<T>(static_cast<py::ssize_t>(n), data);
}

py::tuple index_tar(const std::string& path) {
  Index index;
  int open_error = 0;
  {
    const py::gil_scoped_release release;
    const File file(path.c_str());
    open_error = file.error();
    if (open_error == 0) {
      try {
        scan(file, index);
      } catch (const Damaged& damage) {
        index.error = damage.what();
      }
    }
  }
  if (open_error != 0) {
    errno = open_error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw py::error_already_set();
  }
  const auto* name_bytes = reinterpret_cast<const uint8_t*>(index.names.data());
  return py::make_tuple(to_array(name_bytes, index.names.size()),
                        to_array(index.name_offsets.data(), index.name_offsets.size()),
                        to_array(index.offsets.data(), index.offsets.size()),
                        to_array(index.sizes.data(), index.sizes.size()), index.error);
}

}  // namespace

void bind_tar_index(py::module_& m) {
  m.def("index_tar", &index_tar, py::arg("path"),
        R"(Where the N regular files of a tar archive lie.

Returns (names, name_offsets, offsets, sizes, error): `names[name_offsets[i]:name_offsets[i + 1]]`
(uint8, as stored) names file i, whose data are the bytes [offsets[i], offsets[i] + sizes[i]).
`error` is None, or why the scan stopped (truncated or damaged archive); the files before are listed.
Raises OSError if the archive cannot be opened.)");
}

}  // namespace vlpfast
