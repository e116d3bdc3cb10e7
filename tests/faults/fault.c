/* Fail points, loaded with LD_PRELOAD: counts the calls that change a file in a folder.
   At call number `at`, the process is killed before it (BEFORE), or in or after it (HALF: half of a
   write, any other call whole), or the call fails, once or from then on (ONCE, STICKY). With at = 0,
   the descriptor `report` gets a line for each call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
enum { PASS, BEFORE, HALF, ONCE, STICKY };
static char folder[1000];
static int at = -1, mode, error, report, count;
void fault_arm(int at_, int mode_, int error_, int report_, const char *folder_) {
  at = at_, mode = mode_, error = error_, report = report_, strncpy(folder, folder_, 999);
}

/* Count a call that changes `path` in the open folder `fd` (without a path: the open file `fd`), and
   return what becomes of it. `space`: a full disk makes it fail. */
static int gate(const char *name, int fd, const char *path, int space) {
  char link[40], where[4096] = "";
  int kept = errno, n = 0;
  if (at < 0) return PASS;
  if (!path || path[0] != '/') {
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    if ((n = readlink(link, where, 2000)) < 0) n = 0;
  }
  snprintf(where + n, 2000, path && n ? "/%s" : "%s", path ? path : "");
  errno = kept;
  if (strncmp(where, folder, strlen(folder))) return PASS;
  int number = __sync_add_and_fetch(&count, 1);
  if (!at) dprintf(report, "%d %s %s\n", space, name, where);
  if (!at || number < at || (number > at && mode != STICKY)) return PASS;
  if (mode == BEFORE) kill(getpid(), SIGKILL), pause();
  if (mode != HALF && error == ENOSPC && !space) return PASS;
  return errno = error, mode;
}
/* Define a wrapper. `half` is what is done of the call if the process is killed in it. */
#define CALL(type, name, parameters, arguments, half, fd, path, space, failed) \
  type name parameters {                                                       \
    static type(*real) parameters;                                             \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);                      \
    int fate = gate(#name, fd, path, space);                                   \
    if (fate == HALF) real half, kill(getpid(), SIGKILL), pause();             \
    return fate == PASS ? real arguments : failed;                             \
  }
#define DATA(name, parameters, arguments, half) CALL(ssize_t, name, parameters, arguments, half, f, 0, 1, -1)
#define PATH(name, parameters, arguments, fd, path, space) CALL(int, name, parameters, arguments, arguments, fd, path, space, -1)
DATA(write, (int f, const void *b, size_t n), (f, b, n), (f, b, n / 2))
DATA(pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), (f, b, n / 2, o))
DATA(pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), (f, b, n / 2, o))
DATA(writev, (int f, const void *v, int n), (f, v, n), (f, v, n / 2))
DATA(sendfile, (int f, int i, off_t *o, size_t n), (f, i, o, n), (f, i, o, 9))
DATA(sendfile64, (int f, int i, off64_t *o, size_t n), (f, i, o, n), (f, i, o, 9))
DATA(copy_file_range, (int i, off64_t *p, int f, off64_t *o, size_t n, unsigned u), (i, p, f, o, n, u), (i, p, f, o, 9, u))
CALL(size_t, fwrite, (const void *b, size_t s, size_t n, FILE *f), (b, s, n, f), (b, s, n / 2, f), fileno(f), 0, 1, 0)
PATH(fsync, (int f), (f), f, 0, 1)
PATH(fdatasync, (int f), (f), f, 0, 1)
PATH(ftruncate, (int f, off_t n), (f, n), f, 0, 0)
PATH(ftruncate64, (int f, off64_t n), (f, n), f, 0, 0)
PATH(mkdir, (const char *p, mode_t m), (p, m), AT_FDCWD, p, 1)
PATH(mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p, 1)
PATH(rmdir, (const char *p), (p), AT_FDCWD, p, 0)
PATH(unlink, (const char *p), (p), AT_FDCWD, p, 0)
PATH(unlinkat, (int d, const char *p, int f), (d, p, f), d, p, 0)
PATH(rename, (const char *p, const char *q), (p, q), AT_FDCWD, q, 1)
PATH(renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), e, q, 1)
/* An open counts if it creates or empties a file. */
#define OPEN(name)                                                                        \
  int name(const char *path, int flags, ...) {                                            \
    static int (*real)(const char *, int, ...);                                           \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);                                 \
    va_list more;                                                                         \
    va_start(more, flags);                                                                \
    int fate = flags & (O_CREAT | O_TRUNC) ? gate(#name, AT_FDCWD, path, 1) : PASS, result = -1;\
    if (fate == PASS || fate == HALF) result = real(path, flags, va_arg(more, int));      \
    if (fate == HALF) kill(getpid(), SIGKILL), pause();                                   \
    va_end(more);                                                                         \
    return result;                                                                        \
  }
OPEN(open)
OPEN(open64)
