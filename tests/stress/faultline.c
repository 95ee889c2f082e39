/* Makes one file operation of this process fail, or be its last. Preloaded; armed and read through ctypes.

   Only descriptors and paths below the armed folder count, so that the rest of the process is left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL_ONCE, FAIL_ON, KILL_BEFORE, KILL_AFTER, KILL_TORN };

static char folder[4096];
static atomic_long seen;
static long at = -1;
static int action, code, reads;
static char first[20];

void faultline_arm(const char *root, long call, int what, int error, int with_reads) {
    strncpy(folder, root, sizeof folder - 1);
    action = what;
    code = error;
    reads = with_reads;
    first[0] = 0;
    atomic_store(&seen, 0);
    at = call;
}
long faultline_seen(void) { return atomic_load(&seen); }
const char *faultline_first(void) { return first; }

static int below(int fd) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return !strncmp(path, folder, strlen(folder));
}

/* 0: go on; 1: fail; 2: be killed afterwards; 3: be killed in the middle */
static int turn(const char *name, int counts) {
    if (at < 0 || !counts) return 0;
    long now = atomic_fetch_add(&seen, 1) + 1;
    if (now < at || (now > at && action != FAIL_ON)) return 0;
    if (!first[0]) strncpy(first, name, sizeof first - 1);
    if (action == KILL_BEFORE) raise(SIGKILL);
    return action <= FAIL_ON ? 1 : action == KILL_AFTER ? 2 : 3;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(type, name, counts, args)                                                                                \
    {                                                                                                                 \
        int what = turn(#name, counts);                                                                               \
        if (what == 1) {                                                                                              \
            errno = code;                                                                                             \
            return -1;                                                                                                \
        }                                                                                                             \
        type result = REAL(name) args;                                                                                \
        if (what) raise(SIGKILL);                                                                                     \
        return result;                                                                                                \
    }
#define WRITE(name)                                                                                                   \
    ssize_t name(int fd, const void *bytes, size_t n, off_t offset) {                                                 \
        int what = turn(#name, below(fd));                                                                            \
        if (what == 1) {                                                                                              \
            errno = code;                                                                                             \
            return -1;                                                                                                \
        }                                                                                                             \
        ssize_t result = REAL(name)(fd, bytes, what == 3 ? n / 2 : n, offset);                                        \
        if (what) raise(SIGKILL);                                                                                     \
        return result;                                                                                                \
    }
WRITE(pwrite)
WRITE(pwrite64)
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t o) CALL(ssize_t, pwritev, below(fd), (fd, v, n, o))
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t o) CALL(ssize_t, pwritev64, below(fd), (fd, v, n, o))
ssize_t pread(int fd, void *b, size_t n, off_t o) CALL(ssize_t, pread, reads && below(fd), (fd, b, n, o))
ssize_t pread64(int fd, void *b, size_t n, off_t o) CALL(ssize_t, pread64, reads && below(fd), (fd, b, n, o))
ssize_t preadv(int fd, const struct iovec *v, int n, off_t o) CALL(ssize_t, preadv, reads && below(fd), (fd, v, n, o))
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t o)
    CALL(ssize_t, preadv64, reads && below(fd), (fd, v, n, o))
int fsync(int fd) CALL(int, fsync, below(fd), (fd))
int fdatasync(int fd) CALL(int, fdatasync, below(fd), (fd))
int ftruncate(int fd, off_t n) CALL(int, ftruncate, below(fd), (fd, n))
int ftruncate64(int fd, off_t n) CALL(int, ftruncate64, below(fd), (fd, n))
int fallocate(int fd, int m, off_t o, off_t n) CALL(int, fallocate, below(fd), (fd, m, o, n))
int fallocate64(int fd, int m, off_t o, off_t n) CALL(int, fallocate64, below(fd), (fd, m, o, n))
int link(const char *a, const char *b) CALL(int, link, 1, (a, b))
int linkat(int f, const char *a, int g, const char *b, int h) CALL(int, linkat, 1, (f, a, g, b, h))
int rename(const char *a, const char *b) CALL(int, rename, 1, (a, b))
int renameat(int f, const char *a, int g, const char *b) CALL(int, renameat, 1, (f, a, g, b))
int unlink(const char *a) CALL(int, unlink, 1, (a))
int unlinkat(int f, const char *a, int h) CALL(int, unlinkat, 1, (f, a, h))
int mkdir(const char *a, mode_t m) CALL(int, mkdir, 1, (a, m))
int mkdirat(int f, const char *a, mode_t m) CALL(int, mkdirat, 1, (f, a, m))

/* This family returns its error. */
int posix_fallocate(int fd, off_t o, off_t n) {
    int what = turn("posix_fallocate", below(fd));
    if (what == 1) return code;
    int result = REAL(posix_fallocate)(fd, o, n);
    if (what) raise(SIGKILL);
    return result;
}
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    int what = turn("posix_fallocate64", below(fd));
    if (what == 1) return code;
    int result = REAL(posix_fallocate64)(fd, o, n);
    if (what) raise(SIGKILL);
    return result;
}
