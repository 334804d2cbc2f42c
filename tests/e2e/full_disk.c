/* Preloaded into a server under test: as long as the file that $FULL_DISK names exists, the disk is full. */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_full(int fd)
{
    struct stat info;
    const char *flag = getenv("FULL_DISK");
    if (fd <= STDERR_FILENO || fstat(fd, &info) || !S_ISREG(info.st_mode)) return 0;
    if (!flag || access(flag, F_OK)) return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size)
{
    return is_full(fd) ? -1 : syscall(SYS_write, fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return is_full(fd) ? -1 : syscall(SYS_pwrite64, fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
