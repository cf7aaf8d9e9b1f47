// To be preloaded: calls that change or read files below a folder are counted and traced, and one of them fails.
// Nothing happens before strike() is called. Compiled by tests/faults/points.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILLED, FULL, BROKEN, SHORT, UNREADABLE };
static char folder[PATH_MAX], path_struck[PATH_MAX], call_struck[16];
static int kind, number, seen, without_room, trace = -1;

// From now on the `at`-th `call` of `path`, below `below`, is struck; all calls there are lines of the descriptor `log`.
void strike(const char *below, int what, const char *call, const char *path, int at, int log)
{
    seen = without_room = 0;
    kind = what, number = at, trace = log;
    snprintf(call_struck, sizeof call_struck, "%s", call);
    snprintf(path_struck, sizeof path_struck, "%s", path);
    snprintf(folder, sizeof folder, "%s/", below);
}

static const char *full(int at, const char *path, char *out)
{
    static __thread char base[PATH_MAX];
    char link[64];
    if (path && path[0] == '/')
        return path;
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, base, sizeof base - 1);
    base[length < 0 ? 0 : length] = 0;
    snprintf(out, PATH_MAX, path ? "%s/%s" : "%s", base, path);
    return out;
}

// What happens to this call: 0 for nothing, or FULL, BROKEN (fail) or SHORT; KILLED where it writes, else the end.
static int struck(const char *call, int at, const char *path, int to_at, const char *to)
{
    static __thread char one[PATH_MAX], two[PATH_MAX];
    int saved = errno, writing = !strcmp(call, "write");
    const char *first = full(at, path, one), *second = to ? full(to_at, to, two) : "";
    if (strncmp(first, folder, strlen(folder)) && strncmp(second, folder, strlen(folder)))
        return errno = saved, 0;
    int due = kind != COUNT && !strcmp(call, call_struck) && !strcmp(first, path_struck) &&
              __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) == number;
    if (trace >= 0)
        dprintf(trace, "%s%s\t%s\t%s\n", due ? "! " : "", call, first, second);
    errno = saved;
    if (kind == FULL) { // and stays so: who frees nothing can write nothing
        int growing = writing || !strcmp(call, "create") || !strcmp(call, "mkdir");
        without_room += due || (without_room && growing);
        return without_room && growing ? FULL : 0;
    }
    if (due && kind == KILLED && !writing)
        kill(getpid(), SIGKILL);
    return due ? kind : 0;
}

// `struck`, but for a signal's handler that interrupts it, and has a small stack of its own.
static int due(const char *call, int at, const char *path, int to_at, const char *to)
{
    static __thread int busy;
    if (busy || !folder[0])
        return 0;
    busy = 1;
    int fault = struck(call, at, path, to_at, to);
    busy = 0;
    return fault;
}

static int fails(int fault)
{
    if (fault == FULL || fault == BROKEN || fault == UNREADABLE)
        return errno = fault == FULL ? ENOSPC : EIO, 1;
    return 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CALL(type, name, parameters, arguments, call, ...)                                                             \
    type name parameters                                                                                               \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails(due(call, __VA_ARGS__)) ? -1 : real arguments;                                                    \
    }

CALL(int, fsync, (int fd), (fd), "fsync", fd, NULL, 0, NULL)
CALL(int, fdatasync, (int fd), (fd), "fsync", fd, NULL, 0, NULL)
CALL(int, rename, (const char *a, const char *b), (a, b), "rename", AT_FDCWD, a, AT_FDCWD, b)
CALL(int, renameat, (int f, const char *a, int t, const char *b), (f, a, t, b), "rename", f, a, t, b)
CALL(int, renameat2, (int f, const char *a, int t, const char *b, unsigned g), (f, a, t, b, g), "rename", f, a, t, b)
CALL(int, unlink, (const char *path), (path), "unlink", AT_FDCWD, path, 0, NULL)
CALL(int, unlinkat, (int at, const char *path, int g), (at, path, g), g ? "rmdir" : "unlink", at, path, 0, NULL)
CALL(int, rmdir, (const char *path), (path), "rmdir", AT_FDCWD, path, 0, NULL)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), "mkdir", AT_FDCWD, path, 0, NULL)
CALL(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), "mkdir", at, path, 0, NULL)
CALL(int, link, (const char *a, const char *b), (a, b), "create", AT_FDCWD, b, 0, NULL)
CALL(int, symlink, (const char *a, const char *b), (a, b), "create", AT_FDCWD, b, 0, NULL)
CALL(int, ftruncate, (int fd, off_t size), (fd, size), "truncate", fd, NULL, 0, NULL)
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), "truncate", fd, NULL, 0, NULL)
CALL(ssize_t, read, (int fd, void *data, size_t n), (fd, data, n), "read", fd, NULL, 0, NULL)
CALL(ssize_t, pread, (int fd, void *data, size_t n, off_t o), (fd, data, n, o), "read", fd, NULL, 0, NULL)
CALL(ssize_t, pread64, (int fd, void *data, size_t n, off64_t o), (fd, data, n, o), "read", fd, NULL, 0, NULL)
CALL(ssize_t, readv, (int fd, const struct iovec *v, int n), (fd, v, n), "read", fd, NULL, 0, NULL)

// A call that writes `n` bytes: of a struck one half arrives, the end of a full disk and a kill included.
#define WRITE(name, parameters, arguments, fd)                                                                         \
    ssize_t name parameters                                                                                            \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        int fault = due("write", fd, NULL, 0, NULL);                                                                   \
        if (fault && fault != BROKEN)                                                                                  \
            n /= 2;                                                                                                    \
        if (fault == BROKEN || (fault == FULL && (!n || without_room > 1)))                                            \
            return fails(fault), -1;                                                                                   \
        ssize_t done = real arguments;                                                                                 \
        if (fault == KILLED)                                                                                           \
            kill(getpid(), SIGKILL);                                                                                   \
        return done;                                                                                                   \
    }

WRITE(write, (int fd, const void *data, size_t n), (fd, data, n), fd)
WRITE(pwrite, (int fd, const void *data, size_t n, off_t o), (fd, data, n, o), fd)
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t o), (fd, data, n, o), fd)
WRITE(writev, (int fd, const struct iovec *v, int n), (fd, v, n), fd)
WRITE(sendfile64, (int fd, int from, off64_t *o, size_t n), (fd, from, o, n), fd)
WRITE(copy_file_range, (int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned g), (from, a, fd, b, n, g), fd)

#define OPEN(name, head, dir, ...)                                                                                     \
    int name(head const char *path, int flags, ...)                                                                    \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        const char *call = flags & O_CREAT ? "create" : "open";                                                        \
        int changing = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);                                                \
        return changing && fails(due(call, dir, path, 0, NULL)) ? -1 : real(__VA_ARGS__);                              \
    }
#define AT int at,
OPEN(open, , AT_FDCWD, path, flags, mode)
OPEN(open64, , AT_FDCWD, path, flags, mode)
OPEN(openat, AT, at, at, path, flags, mode)
OPEN(openat64, AT, at, at, path, flags, mode)
