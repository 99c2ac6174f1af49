#!/bin/sh
# Builds the C library and installs it: header, shared and static library, pkg-config file, CMake package.
#
#   ffi/install.sh [--prefix DIR] [--libdir NAME] [--built DIR]
#
# DESTDIR in the environment is put before every path, for those who make packages. For Linux.
set -eu

usage() {
    cat <<'END'
usage: ffi/install.sh [--prefix DIR] [--libdir NAME] [--built DIR]
  --prefix DIR    where to install; /usr/local if not given
  --libdir NAME   folder of the libraries below the prefix, such as lib64; lib if not given
  --built DIR     folder that holds libns_llm.so and libns_llm.a; if not given, cargo builds them
END
}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

prefix=/usr/local
libdir=lib
built=
while [ $# -gt 0 ]; do
    case $1 in
    --help)
        usage
        exit 0
        ;;
    --prefix | --libdir | --built)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --prefix) prefix=$2 ;;
        --libdir) libdir=$2 ;;
        --built) built=$2 ;;
        esac
        shift 2
        ;;
    *)
        usage >&2
        fail "$1 is not an option"
        ;;
    esac
done
case $prefix in
/*) ;;
*) fail "the prefix must be an absolute path, it is $prefix" ;;
esac
# The files find each other by relative paths.
case $libdir in
*/* | '') fail "libdir must be the name of one folder, it is '$libdir'" ;;
esac
[ "$(uname -s)" = Linux ] || fail "made for Linux only"

ffi=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
header=$ffi/../include/ns_llm.h

if [ -z "$built" ]; then
    (cd "$ffi" && cargo build --release --package ns-llm-ffi)
    built=${CARGO_TARGET_DIR:-$ffi/../target}/release
fi
for library in libns_llm.so libns_llm.a; do
    [ -f "$built/$library" ] || fail "$built has no $library"
done

# The version from the header that is installed; its ABI version as in the name of the shared library.
part() { sed -n "s/^#define NS_LLM_VERSION_$1 \([0-9]*\)$/\1/p" "$header"; }
version=$(part MAJOR).$(part MINOR).$(part PATCH)
abi=$(part MAJOR)
[ "$abi" != 0 ] || abi=0.$(part MINOR)
soname=libns_llm.so.$abi

fill() {
    sed -e "s|@VERSION@|$version|g" -e "s|@ABI@|$abi|g" -e "s|@SONAME@|$soname|g" -e "s|@LIBDIR@|$libdir|g" \
        -e "s|@MAJOR_MINOR@|$(part MAJOR).$(part MINOR)|g" "$ffi/packaging/$1.in" >"$2/$1"
    chmod 644 "$2/$1"
}

root=${DESTDIR:-}$prefix
mkdir -p "$root/include" "$root/$libdir/pkgconfig" "$root/$libdir/cmake/ns_llm"
install -m 644 "$header" "$root/include/ns_llm.h"
install -m 755 "$built/libns_llm.so" "$root/$libdir/libns_llm.so.$version"
ln -sf "libns_llm.so.$version" "$root/$libdir/$soname"
ln -sf "$soname" "$root/$libdir/libns_llm.so"
install -m 644 "$built/libns_llm.a" "$root/$libdir/libns_llm.a"
fill ns_llm.pc "$root/$libdir/pkgconfig"
fill ns_llm-config.cmake "$root/$libdir/cmake/ns_llm"
fill ns_llm-config-version.cmake "$root/$libdir/cmake/ns_llm"
echo "installed ns_llm $version into $root"
