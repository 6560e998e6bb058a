# RV64F and RV64D: values, flags, NaN boxing; in U-mode. NX 1, UF 2, OF 4, DZ 8, NV 16.
#include "test.h"

#define FLAGS(flags) csrrw t2, fflags, zero; li t1, flags; beq t1, t2, 77f; j ufail; 77:
#define S2(n, inst, want, flags, a, b) \
        li gp, n; li a1, a; li a2, b; fmv.w.x fa1, a1; fmv.w.x fa2, a2; inst fa3, fa1, fa2; fmv.x.d a4, fa3; \
        li t2, (want) | 0xffffffff00000000; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define D2(n, inst, want, flags, a, b) \
        li gp, n; li a1, a; li a2, b; fmv.d.x fa1, a1; fmv.d.x fa2, a2; inst fa3, fa1, fa2; fmv.x.d a4, fa3; \
        li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define D3(n, inst, want, flags, a, b, c) \
        li gp, n; li a1, a; li a2, b; li a3, c; fmv.d.x fa1, a1; fmv.d.x fa2, a2; fmv.d.x fa3, a3; \
        inst fa4, fa1, fa2, fa3; fmv.x.d a4, fa4; li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define D1(n, inst, want, flags, a) \
        li gp, n; li a1, a; fmv.d.x fa1, a1; inst fa3, fa1; fmv.x.d a4, fa3; \
        li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define CMP_D(n, inst, want, flags, a, b) \
        li gp, n; li a1, a; li a2, b; fmv.d.x fa1, a1; fmv.d.x fa2, a2; inst a4, fa1, fa2; \
        li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define TO_X_D(n, inst, want, flags, a, rm) \
        li gp, n; li a1, a; fmv.d.x fa1, a1; inst a4, fa1, rm; li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)
#define FROM_X(n, inst, want, flags, a) \
        li gp, n; li a1, a; inst fa1, a1; fmv.x.d a4, fa1; li t2, want; beq a4, t2, 77f; j ufail; 77: FLAGS(flags)

#define ONE 0x3ff0000000000000
#define TWO 0x4000000000000000
#define MAX 0x7fefffffffffffff
#define INF 0x7ff0000000000000
#define QNAN 0x7ff8000000000000
#define SNAN 0x7ff0000000000001
#define NEG (1 << 63)
#define MIN 0x0010000000000000

        START
        GO(U, user)
user:
        D2(1, fadd.d, 0x4008000000000000, 0, ONE, TWO)
        D2(2, fadd.d, ONE, 1, ONE, 0x3c90000000000000)
        D2(3, fsub.d, 0, 0, ONE, ONE)
        D2(4, fsub.d, QNAN, 16, INF, INF)
        D2(5, fmul.d, INF, 5, MAX, TWO)
        D2(6, fmul.d, 0x0008000000000000, 0, MIN, 0x3fe0000000000000)
        D2(7, fmul.d, 0, 3, 1, 0x3fd0000000000000)
        D2(8, fdiv.d, INF, 8, ONE, 0)
        D2(9, fdiv.d, INF | NEG, 8, ONE, NEG)
        D2(10, fdiv.d, QNAN, 16, 0, 0)
        D2(11, fdiv.d, 0x3fd5555555555555, 1, ONE, 0x4008000000000000)
        D2(12, fadd.d, QNAN, 0, 0xfff8000000001234, ONE)
        D2(13, fadd.d, QNAN, 16, ONE, SNAN)
        D1(14, fsqrt.d, 0x3ff6a09e667f3bcd, 1, TWO)
        D1(15, fsqrt.d, QNAN, 16, ONE | NEG)
        D1(16, fsqrt.d, NEG, 0, NEG)
        D3(17, fmadd.d, 0x4008000000000000, 0, ONE, TWO, ONE)
        D3(18, fmsub.d, ONE, 0, ONE, TWO, ONE)
        D3(19, fnmsub.d, ONE | NEG, 0, ONE, TWO, ONE)
        D3(20, fnmadd.d, 0xc008000000000000, 0, ONE, TWO, ONE)
        D3(21, fmadd.d, QNAN, 16, INF, 0, QNAN)
        D3(22, fnmadd.d, QNAN, 16, INF, ONE, INF | NEG)
        D3(23, fmadd.d, 0x3970000000000000, 0, 0x3ff0000000000001, 0x3ff0000000000001, 0xbff0000000000002)
        D2(24, fmin.d, NEG, 0, 0, NEG)
        D2(25, fmax.d, 0, 0, NEG, 0)
        D2(26, fmin.d, ONE, 0, QNAN, ONE)
        D2(27, fmax.d, ONE, 16, ONE, SNAN)
        D2(28, fmin.d, QNAN, 0, 0xfff8000000000001, QNAN)
        D2(29, fsgnj.d, SNAN | NEG, 0, SNAN, NEG)
        D2(30, fsgnjn.d, SNAN, 0, SNAN, NEG)
        D2(31, fsgnjx.d, ONE, 0, ONE | NEG, TWO | NEG)
        CMP_D(32, feq.d, 1, 0, 0, NEG)
        CMP_D(33, feq.d, 0, 0, QNAN, QNAN)
        CMP_D(34, feq.d, 0, 16, SNAN, ONE)
        CMP_D(35, flt.d, 1, 0, ONE, TWO)
        CMP_D(36, flt.d, 0, 16, QNAN, TWO)
        CMP_D(37, fle.d, 1, 0, ONE, ONE)
        CMP_D(38, fle.d, 0, 16, ONE, QNAN)

        S2(40, fadd.s, 0x40400000, 0, 0x3f800000, 0x40000000)
        S2(41, fmul.s, 0x7f800000, 5, 0x7f7fffff, 0x40000000)
        S2(42, fdiv.s, 0x3eaaaaab, 1, 0x3f800000, 0x40400000)
        S2(43, fsub.s, 0x7fc00000, 16, 0x7f800000, 0x7f800000)
        S2(44, fmul.s, 0x00800000, 3, 0x00ffffff, 0x3f000000)
        S2(45, fmin.s, 0xbf800000, 0, 0xbf800000, 0x7fc00001)
        S2(46, fsgnjx.s, 0x3f800000, 0, 0xbf800000, 0xbf800000)

        TEST(50) # not NaN-boxed: counts as the canonical NaN
        li a1, ONE
        fmv.d.x fa1, a1
        li a2, 0x3f800000
        fmv.w.x fa2, a2
        fadd.s fa3, fa1, fa2
        fmv.x.d a4, fa3
        CHECK(a4, 0xffffffff7fc00000)
        FLAGS(0)
        feq.s a4, fa1, fa1
        CHECK(a4, 0)
        fclass.s a4, fa1
        CHECK(a4, 0x200)
        fsgnj.s fa3, fa1, fa2
        fmv.x.d a4, fa3
        CHECK(a4, 0xffffffff7fc00000)
        TEST(51) # but moves and stores take the low half as it is
        li a1, 0x12345678c0000000
        fmv.d.x fa1, a1
        fmv.x.w a4, fa1
        CHECK(a4, 0xffffffffc0000000)
        la a3, cell
        fsw fa1, 0(a3)
        lwu a4, 0(a3)
        CHECK(a4, 0xc0000000)
        flw fa2, 0(a3)
        fmv.x.d a4, fa2
        CHECK(a4, 0xffffffffc0000000)
        fsd fa1, 0(a3)
        fld fa2, 0(a3)
        fmv.x.d a4, fa2
        CHECK(a4, 0x12345678c0000000)

        TO_X_D(60, fcvt.w.d, 1, 1, 0x3ff8000000000000, rtz)
        TO_X_D(61, fcvt.w.d, 2, 1, 0x3ff8000000000000, rne)
        TO_X_D(62, fcvt.w.d, 2, 1, 0x4004000000000000, rne)
        TO_X_D(63, fcvt.w.d, 3, 1, 0x4004000000000000, rmm)
        TO_X_D(64, fcvt.w.d, -3, 1, 0xc004000000000000, rdn)
        TO_X_D(65, fcvt.w.d, -2, 1, 0xc004000000000000, rup)
        TO_X_D(66, fcvt.w.d, 0x7fffffff, 16, 0x41e0000000000000, rtz)
        TO_X_D(67, fcvt.w.d, 0xffffffff80000000, 0, 0xc1e0000000000000, rtz)
        TO_X_D(68, fcvt.w.d, 0x7fffffff, 16, QNAN, rtz)
        TO_X_D(69, fcvt.wu.d, 0xffffffffffffffff, 16, QNAN, rtz)
        TO_X_D(70, fcvt.wu.d, 0, 16, 0xbff0000000000000, rtz)
        TO_X_D(71, fcvt.wu.d, 0, 1, 0xbfe0000000000000, rtz)
        TO_X_D(72, fcvt.wu.d, 0xffffffff80000000, 0, 0x41e0000000000000, rtz)
        TO_X_D(73, fcvt.l.d, 0x7fffffffffffffff, 16, 0x43e0000000000000, rtz)
        TO_X_D(74, fcvt.l.d, 1 << 63, 16, INF | NEG, rtz)
        TO_X_D(75, fcvt.lu.d, 1 << 63, 0, 0x43e0000000000000, rtz)
        TO_X_D(76, fcvt.lu.d, -1, 16, INF, rtz)
        FROM_X(80, fcvt.d.w, 0xbff0000000000000, 0, 0x00000000ffffffff)
        FROM_X(81, fcvt.d.wu, 0x41efffffffe00000, 0, -1)
        FROM_X(82, fcvt.d.l, 0xc3e0000000000000, 0, 1 << 63)
        FROM_X(83, fcvt.d.lu, 0x43f0000000000000, 1, -1)
        FROM_X(84, fcvt.s.w, 0xffffffff4f000000, 1, 0x7fffffff)
        FROM_X(85, fcvt.s.lu, 0xffffffff5f800000, 1, -1)
        D1(90, fcvt.s.d, 0xffffffff3f800000, 0, ONE)
        D1(91, fcvt.s.d, 0xffffffff7fc00000, 16, SNAN)
        D1(92, fcvt.s.d, 0xffffffff00000000, 3, 1)
        D1(93, fcvt.d.s, ONE, 0, 0xffffffff3f800000)
        D1(94, fcvt.d.s, QNAN, 16, 0xffffffff7f800001)
        D1(95, fcvt.d.s, QNAN, 0, ONE)

        TEST(100) # rounding modes from fcsr
        li a1, ONE
        fmv.d.x fa1, a1
        li a1, 0x4008000000000000
        fmv.d.x fa2, a1
        fsrmi 1
        fdiv.d fa3, fa1, fa2
        fmv.x.d a4, fa3
        CHECK(a4, 0x3fd5555555555555)
        fsrmi 3
        fdiv.d fa3, fa1, fa2
        fmv.x.d a4, fa3
        CHECK(a4, 0x3fd5555555555556)
        frrm a4
        CHECK(a4, 3)
        frcsr a4
        CHECK(a4, 0x61)
        fsrmi 4
        li a1, 0x3ca0000000000000 # half a unit in the last place of 1
        fmv.d.x fa2, a1
        fadd.d fa3, fa1, fa2
        fmv.x.d a4, fa3
        CHECK(a4, 0x3ff0000000000001)
        fadd.d fa3, fa1, fa2, rne
        fmv.x.d a4, fa3
        CHECK(a4, ONE)
        fsrmi 2
        fsub.d fa3, fa1, fa1
        fmv.x.d a4, fa3
        CHECK(a4, NEG)
        fscsr zero
        TEST(101) # flags accrue until they are cleared
        li a1, INF
        fmv.d.x fa2, a1
        fsub.d fa3, fa2, fa2
        li a1, 0x3fd5555555555555
        fmv.d.x fa2, a1
        fmul.d fa3, fa2, fa2
        frflags a4
        CHECK(a4, 17)
        fsflagsi 8
        frflags a4
        CHECK(a4, 8)
        csrrsi a4, fflags, 1
        CHECK(a4, 8)
        csrrci a4, fcsr, 8
        CHECK(a4, 9)
        frflags a4
        CHECK(a4, 1)
        fscsr zero
        li a1, 0x8000000000000001
        fmv.d.x fa1, a1
        fclass.d a4, fa1
        CHECK(a4, 4)
        TEST(102) # FS gets dirty whichever way an instruction in a loop is reached, and only then
        TO_M(fs)
fs:
        li a2, 2
        la a1, start
        jal ra, loop
        CHECK_BITS(a4, MSTATUS_FS, MSTATUS_FS)
        li a2, 2
        la a1, around
        jal ra, loop
        CHECK_BITS(a4, MSTATUS_FS, MSTATUS_FS)
        li a2, 1
        la a1, around
        jal ra, loop
        CHECK_BITS(a4, MSTATUS_FS, 0x2000)
        j pass

loop:   li t1, MSTATUS_FS
        csrc mstatus, t1
        li t1, 0x2000 # initial
        csrs mstatus, t1
        la t1, start
        j start
start:  bne a1, t1, middle
        fadd.d fa3, fa1, fa2
head:   fadd.d fa3, fa1, fa2
        addi a2, a2, -1
middle: addi a2, a2, -1
        bgtz a2, head
        csrr a4, mstatus
        ret
around:

        .data
        .balign 8
cell:   .dword 0
