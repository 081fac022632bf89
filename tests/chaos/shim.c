/* What a test may do to a process from outside: slow its fsync, fill its disk, move its wall clock.
 *
 * Loaded by LD_PRELOAD. The file that CHAOS_SHIM names holds the four numbers of `struct control`; it is mapped, so that
 * whoever writes it changes all processes that share it at once. The monotonic clock is left alone, as a step of the wall
 * clock leaves it alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_offset_ms;
    int64_t fsync_delay_ms;
    int64_t disk_is_full;
    int64_t unused;
};

static const volatile struct control nothing;
static const volatile struct control *control = &nothing;

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("CHAOS_SHIM");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct control), PROT_READ, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) control = found;
    close(file);
}

static void delay(void) {
    int64_t ms = control->fsync_delay_ms;
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
    if (ms > 0) nanosleep(&pause, NULL);
}

int fsync(int file) {
    delay();
    return (int)syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    delay();
    return (int)syscall(SYS_fdatasync, file);
}

ssize_t write(int file, const void *data, size_t length) {
    struct stat found;
    if (control->disk_is_full && fstat(file, &found) == 0 && S_ISREG(found.st_mode)) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_write, file, data, length);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && clock == CLOCK_REALTIME) now->tv_sec += control->clock_offset_ms / 1000;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int status = real(now, zone);
    if (status == 0) now->tv_sec += control->clock_offset_ms / 1000;
    return status;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
