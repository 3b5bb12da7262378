// What a wheel brings along because RHEL 8's C and C++ libraries lack it: PyTorch's headers and ours are compiled against
// newer ones. Elsewhere this file isn't built.
#include <sstream>

// Members that libstdc++ has compiled only since GCC 9 and 11.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

// Since glibc 2.32 a hint for counting references without atomic operations, of which 0 makes no use.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
