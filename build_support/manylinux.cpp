// In the place of glibc 2.32's variable, which libstdc++'s headers read where the compiler's glibc
// has it: reference counts are atomic then, as with every older glibc.

extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
