"""The messages in CRIU's images (images/*.proto of CRIU 4.2), as far as they are looked into."""

from __future__ import annotations

from criu_hooks.protobuf_wire import Kind

INVENTORY = Kind(
    "inventory",
    "img_version=1 fdinfo_per_id=2 root_ids=3b ns_per_id=4 root_cg_set=5 lsmtype=6 dump_uptime=8l"
    " pre_dump_mode=9 tcp_close=10 network_lock_method=11 plugins_entry=12b dump_criu_run_id=13b"
    " allow_uprobes=14",
)
IDS = Kind(
    "task_kobj_ids",
    "vm_id=1 files_id=2 fs_id=3 sighand_id=4 pid_ns_id=5 net_ns_id=6 ipc_ns_id=7 uts_ns_id=8"
    " mnt_ns_id=9 user_ns_id=10 cgroup_ns_id=11 time_ns_id=12",
)
PSTREE = Kind("pstree", "pid=1 ppid=2 pgid=3 sid=4 threads=5*")

CORE = Kind(
    "core",
    "mtype=1 thread_info=2b tc=3b ids=4b thread_core=5b ti_arm=6b ti_aarch64=8b ti_ppc64=9b"
    " ti_s390=10b ti_mips=11b ti_loongarch64=12b ti_riscv64=13b",
)
TASK_CORE = Kind(
    "task_core",
    "task_state=1 exit_code=2 personality=3 flags=4 blk_sigset=5l comm=6b timers=7b rlimits=8b"
    " cg_set=9 signals_s=10b old_seccomp_mode=11 old_seccomp_filter=12 loginuid=13"
    " oom_score_adj=14l sigactions=15b* child_subreaper=18 blk_sigset_extended=20l stop_signo=21"
    " membarrier_registration_mask=22",
)
THREAD_CORE = Kind(
    "thread_core",
    "futex_rla=1l futex_rla_len=2 sched_nice=3 sched_policy=4 sched_prio=5 blk_sigset=6l sas=7b"
    " pdeath_sig=8 signals_p=9b creds=10b seccomp_mode=11 seccomp_filter=12 comm=13b"
    " blk_sigset_extended=14l rseq_entry=15b cg_set=16",
)
CREDS = Kind(
    "creds",
    "uid=1 gid=2 euid=3 egid=4 suid=5 sgid=6 fsuid=7 fsgid=8 cap_inh=9* cap_prm=10* cap_eff=11*"
    " cap_bnd=12* secbits=13 groups=14* lsm_profile=15b lsm_sockcreate=16b apparmor_data=17b"
    " no_new_privs=18 cap_amb=19*",
)
RLIMITS = Kind("task_rlimits", "rlimits=1b*")
RLIMIT = Kind("rlimit", "cur=1l max=2l")

MM = Kind(
    "mm",
    "mm_start_code=1l mm_end_code=2l mm_start_data=3l mm_end_data=4l mm_start_stack=5l"
    " mm_start_brk=6l mm_brk=7l mm_arg_start=8l mm_arg_end=9l mm_env_start=10l mm_env_end=11l"
    " exe_file_id=12 mm_saved_auxv=13l* vmas=14b* dumpable=15l aios=16b* thp_disabled=17",
)
VMA = Kind(
    "vma",
    "start=1l end=2l pgoff=3l shmid=4l prot=5 flags=6 status=7 fd=8l madv=9l fdflags=10",
)
FS = Kind("fs", "cwd_id=1 root_id=2 umask=3")
FDINFO = Kind("fdinfo", "id=1 flags=2 type=3 fd=4 xattr_security_selinux=5b")

FILE = Kind(
    "file",
    "type=1 id=2 reg=3b isk=4b nsf=5b psk=6b nlsk=7b efd=8b epfd=9b sgfd=10b tunf=11b tfd=12b"
    " ify=13b ffy=14b ext=15b usk=16b fifo=17b pipe=18b tty=19b memfd=20b bpf=21b pidfd=22b",
)
FOWN = Kind("fown", "uid=1 euid=2 signum=3 pid_type=4 pid=5")
REG = Kind(
    "reg_file",
    "id=1 flags=2 pos=3l fown=5b name=6b mnt_id=7 size=8l ext=9 mode=10 build_id=11* checksum=12"
    " checksum_config=13 checksum_parameter=14",
)
INET = Kind(
    "inet_sk",
    "id=1 ino=2 family=3 type=4 proto=5 state=6 src_port=7 dst_port=8 flags=9 backlog=10"
    " src_addr=11* dst_addr=12* fown=13b opts=14b v6only=15 ip_opts=16b ifname=17b ns_id=18"
    " shutdown=19 tcp_opts=20b",
)
UNIX = Kind(
    "unix_sk",
    "id=1 ino=2 type=3 state=4 flags=5 uflags=6 backlog=7 peer=8 fown=9b opts=10b name=11b"
    " shutdown=12 file_perms=13b name_dir=14b deleted=15 ns_id=16 mnt_id=17",
)
SOCKET_OPTIONS = Kind(
    "sk_opts",
    "so_sndbuf=1 so_rcvbuf=2 so_snd_tmo_sec=3l so_snd_tmo_usec=4l so_rcv_tmo_sec=5l"
    " so_rcv_tmo_usec=6l reuseaddr=7 so_priority=8 so_rcvlowat=9 so_mark=10 so_passcred=11"
    " so_passsec=12 so_dontroute=13 so_no_check=14 so_bound_dev=15b so_filter=16f* so_reuseport=17"
    " so_broadcast=18 so_keepalive=19 tcp_keepcnt=20 tcp_keepidle=21 tcp_keepintvl=22"
    " so_oobinline=23 so_linger=24 so_buf_lock=25",
)
EVENTFD = Kind("eventfd_file", "id=1 flags=2 fown=3b counter=4l")
EPOLL = Kind("eventpoll_file", "id=1 flags=2 fown=3b tfd=4b*")
SIGNALFD = Kind("signalfd", "id=1 flags=2 fown=3b sigmask=4l")
TIMERFD = Kind(
    "timerfd",
    "id=1 flags=2 fown=3b clockid=4 ticks=5l settime_flags=6 vsec=7l vnsec=8l isec=9l insec=10l",
)
INOTIFY = Kind("inotify_file", "id=1 flags=2 fown=4b wd=5b*")
INOTIFY_WATCH = Kind("inotify_wd", "id=1 i_ino=2l mask=3 ignored_mask=4 s_dev=5 wd=6 f_handle=7b")
FILE_HANDLE = Kind("fh", "bytes=1 type=2 handle=3l* path=4b mnt_id=5")
FIFO = Kind("fifo", "id=1 pipe_id=2 regf_id=3")
PIPE = Kind("pipe", "id=1 pipe_id=2 flags=3 fown=4b")
TTY = Kind("tty_file", "id=1 tty_info_id=2 flags=3 fown=4b regf_id=6")
MEMFD = Kind("memfd_file", "id=1 flags=2 pos=3l fown=4b inode_id=5")
PIDFD = Kind("pidfd", "id=1 ino=2 flags=3 nspid=4l fown=5b")

MEMFD_INODE = Kind(
    "memfd_inode",
    "name=1b uid=2 gid=3 size=4l shmid=5 seals=6 inode_id=7l hugetlb_flag=8 mode=9",
)
TTY_INFO = Kind(
    "tty_info",
    "id=1 type=2 locked=3 exclusive=4 packet_mode=5 sid=6 pgrp=7 rdev=8 termios=9b"
    " termios_locked=10b winsize=11b pty=12b dev=13 uid=14 gid=15",
)
REMAP = Kind("remap_file_path", "orig_id=1 remap_id=2 remap_type=3")
GHOST = Kind(
    "ghost_file",
    "uid=1 gid=2 mode=3 dev=4 ino=5l rdev=6 atim=7b mtim=8b chunks=9 size=10l symlnk_target=11b",
)
SOCKET_PACKET = Kind("sk_packet", "id_for=1 length=2 scm=4b*")
FILE_PERMISSIONS = Kind("file_perms", "mode=1 uid=2 gid=3")
