// What a library built with VICREG_KERNELS_PORTABLE=1 carries of its own, so that it loads where
// glibc is 2.28 and libstdc++ is GCC 8's, as manylinux_2_28 demands. Linked into each library; the
// kernels' objects are the same with and without it.
#include <new>
#include <sstream>

// libstdc++ looks at this (glibc 2.32) to count references without atomics in one thread. Never
// doing so is right everywhere.
extern "C" {
char __libc_single_threaded = 0;
}

namespace std {

// Newer than GCC 8: a helper, and members of string streams (the default constructors among them).
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;

}  // namespace std

// A call to NAME jumps to the version of it that glibc 2.28 has. The newer version is the same
// function moved to another library (dlsym, pthread_once) or without the error handling of SVID
// (exp and its kind, glibc 2.29), which changes no value. The jump leaves the return address, by which dlsym tells its
// caller.
#define OLDER(NAME, VERSION)                              \
  asm(".symver older_" #NAME ", " #NAME "@" VERSION "\n"  \
      ".pushsection .text\n"                              \
      ".globl " #NAME "\n"                                \
      ".hidden " #NAME "\n"                               \
      ".type " #NAME ", @function\n"                      \
      #NAME ":\n"                                         \
      "  endbr64\n"                                       \
      "  jmp *older_" #NAME "@GOTPCREL(%rip)\n"           \
      ".size " #NAME ", . - " #NAME "\n"                  \
      ".popsection\n");

OLDER(dlsym, "GLIBC_2.2.5")
OLDER(exp, "GLIBC_2.2.5")
OLDER(exp2, "GLIBC_2.2.5")
OLDER(log, "GLIBC_2.2.5")
OLDER(log2, "GLIBC_2.2.5")
OLDER(pow, "GLIBC_2.2.5")

#ifdef USE_CUDA  // the static CUDA runtime's

OLDER(dlclose, "GLIBC_2.2.5")
OLDER(dlerror, "GLIBC_2.2.5")
OLDER(dlmopen, "GLIBC_2.3.4")
OLDER(dlopen, "GLIBC_2.2.5")
OLDER(dlvsym, "GLIBC_2.2.5")
OLDER(pthread_condattr_setpshared, "GLIBC_2.2.5")
OLDER(pthread_create, "GLIBC_2.2.5")
OLDER(pthread_detach, "GLIBC_2.2.5")
OLDER(pthread_getspecific, "GLIBC_2.2.5")
OLDER(pthread_join, "GLIBC_2.2.5")
OLDER(pthread_key_create, "GLIBC_2.2.5")
OLDER(pthread_key_delete, "GLIBC_2.2.5")
OLDER(pthread_kill, "GLIBC_2.2.5")
OLDER(pthread_mutex_trylock, "GLIBC_2.2.5")
OLDER(pthread_mutexattr_destroy, "GLIBC_2.2.5")
OLDER(pthread_mutexattr_init, "GLIBC_2.2.5")
OLDER(pthread_mutexattr_setpshared, "GLIBC_2.2.5")
OLDER(pthread_mutexattr_settype, "GLIBC_2.2.5")
OLDER(pthread_once, "GLIBC_2.2.5")
OLDER(pthread_rwlock_destroy, "GLIBC_2.2.5")
OLDER(pthread_rwlock_init, "GLIBC_2.2.5")
OLDER(pthread_rwlock_rdlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_timedrdlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_timedwrlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_tryrdlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_trywrlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_unlock, "GLIBC_2.2.5")
OLDER(pthread_rwlock_wrlock, "GLIBC_2.2.5")
OLDER(pthread_rwlockattr_destroy, "GLIBC_2.2.5")
OLDER(pthread_rwlockattr_init, "GLIBC_2.2.5")
OLDER(pthread_rwlockattr_setpshared, "GLIBC_2.2.5")
OLDER(pthread_setspecific, "GLIBC_2.2.5")
OLDER(pthread_spin_destroy, "GLIBC_2.2.5")
OLDER(pthread_spin_init, "GLIBC_2.2.5")
OLDER(pthread_spin_lock, "GLIBC_2.2.5")
OLDER(pthread_spin_trylock, "GLIBC_2.2.5")
OLDER(pthread_spin_unlock, "GLIBC_2.2.5")
OLDER(sem_destroy, "GLIBC_2.2.5")
OLDER(sem_init, "GLIBC_2.2.5")
OLDER(sem_post, "GLIBC_2.2.5")
OLDER(sem_timedwait, "GLIBC_2.2.5")
OLDER(sem_trywait, "GLIBC_2.2.5")
OLDER(sem_wait, "GLIBC_2.2.5")
OLDER(shm_open, "GLIBC_2.2.5")
OLDER(shm_unlink, "GLIBC_2.2.5")

#endif
