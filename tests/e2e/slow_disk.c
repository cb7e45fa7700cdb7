/* Fault injection, by LD_PRELOAD: the disk below SLOW_DISK_ROOT needs SLOW_DISK_MS for each call that opens, writes,
   makes durable, renames or removes, and answers no such call while the file SLOW_DISK_HANGS exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void pause_ms(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void wait_for_the_disk(const char *path) {
    const char *root = getenv("SLOW_DISK_ROOT"), *hangs = getenv("SLOW_DISK_HANGS"), *ms = getenv("SLOW_DISK_MS");
    if (!root || !hangs || !ms || !path || strncmp(path, root, strlen(root)) != 0) return;
    pause_ms(atol(ms));
    while (syscall(SYS_faccessat, AT_FDCWD, hangs, F_OK) == 0) pause_ms(50);
}

static void wait_for_the_disk_of(int file) {
    char link[40], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    wait_for_the_disk(path);
}

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, #name))
#define BY_PATH(result, name, path, given, passed) \
    result name given { wait_for_the_disk(path); return NEXT(result(*) given, name) passed; }
#define BY_FILE(result, name, file, given, passed) \
    result name given { wait_for_the_disk_of(file); return NEXT(result(*) given, name) passed; }
#define OPEN(name, given, passed) \
    int name given { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        wait_for_the_disk(path); \
        return NEXT(int(*) given, name) passed; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
BY_PATH(FILE *, fopen, path, (const char *path, const char *mode), (path, mode))
BY_PATH(FILE *, fopen64, path, (const char *path, const char *mode), (path, mode))
BY_PATH(int, rename, to, (const char *from, const char *to), (from, to))
BY_PATH(int, renameat, to, (int here, const char *from, int there, const char *to), (here, from, there, to))
BY_PATH(int, link, to, (const char *from, const char *to), (from, to))
BY_PATH(int, unlink, path, (const char *path), (path))
BY_PATH(int, mkdir, path, (const char *path, mode_t mode), (path, mode))
BY_PATH(int, utimensat, path, (int folder, const char *path, const struct timespec t[2], int flags), (folder, path, t, flags))
BY_FILE(ssize_t, write, file, (int file, const void *from, size_t count), (file, from, count))
BY_FILE(ssize_t, pwrite, file, (int file, const void *from, size_t count, off_t at), (file, from, count, at))
BY_FILE(ssize_t, pwrite64, file, (int file, const void *from, size_t count, off64_t at), (file, from, count, at))
BY_FILE(ssize_t, writev, file, (int file, const struct iovec *from, int count), (file, from, count))
BY_FILE(int, fsync, file, (int file), (file))
BY_FILE(int, fdatasync, file, (int file), (file))
BY_FILE(int, ftruncate, file, (int file, off_t size), (file, size))
BY_FILE(int, ftruncate64, file, (int file, off64_t size), (file, size))
