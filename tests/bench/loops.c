// What short loops cost, in nanoseconds a round: what a further tier of the translator could save shows in the differences
// between them, and to the host's own time.
#include <stdio.h>
#include <time.h>

#define ROUNDS 20000000L

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static _Alignas(4096) long cell[1024]; // two pages

#define LOOP(name, before, body, after)                                                                                   \
    static __attribute__((noinline)) void name(long n)                                                                    \
    {                                                                                                                     \
        __asm__ volatile(before "1:\n" body "dec %0\n jnz 1b\n" after                                                     \
                         : "+c"(n)                                                                                        \
                         : "b"(cell)                                                                                      \
                         : "rax", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "xmm0", "xmm1", "memory", "cc");                         \
    }

#define CHAIN(a, b, c, d)                                                                                                 \
    "add " b "," a "\n xor " c "," a "\n add " a "," b "\n add " d "," c "\n"                                             \
    "xor " a "," d "\n add " b "," c "\n sub " d "," a "\n add " c "," b "\n"

LOOP(nothing, "", "", "")
LOOP(low_registers, "", CHAIN("%%rax", "%%rdx", "%%rsi", "%%rdi"), "")
LOOP(high_registers, "", CHAIN("%%r8", "%%r9", "%%r10", "%%r11"), "")
#define WIDE(a, b, c, d) "add $1," a "\n add $2," b "\n xor $3," c "\n sub $4," d "\n"

LOOP(wide_low, "", WIDE("%%rax", "%%rdx", "%%rsi", "%%rdi") WIDE("%%rdx", "%%rsi", "%%rdi", "%%rax"), "")
LOOP(wide_high, "", WIDE("%%r8", "%%r9", "%%r10", "%%r11") WIDE("%%r9", "%%r10", "%%r11", "%%r8"), "")
LOOP(fp_chain, "xorps %%xmm0,%%xmm0\n xorps %%xmm1,%%xmm1\n", "addsd %%xmm1,%%xmm0\n", "")
LOOP(fp_chain_of_4, "xorps %%xmm0,%%xmm0\n xorps %%xmm1,%%xmm1\n",
     "addsd %%xmm1,%%xmm0\n addsd %%xmm0,%%xmm0\n addsd %%xmm1,%%xmm0\n addsd %%xmm0,%%xmm0\n", "")
LOOP(loads, "", "mov (%1),%%rax\n mov 8(%1),%%rdx\n add %%rax,%%rdx\n mov %%rdx,16(%1)\n", "")
LOOP(chase, "mov %1,(%1)\n mov %1,%%rax\n", "mov (%%rax),%%rax\n", "")
LOOP(called, "sub $128,%%rsp\n", "call 2f\n", "jmp 3f\n2: add $3,%%rax\n ret\n3: add $128,%%rsp\n")
LOOP(inlined, "sub $128,%%rsp\n", "push %%rax\n add $8,%%rsp\n add $3,%%rax\n", "add $128,%%rsp\n")
LOOP(branches, "",
     "test $1,%%cl\n jz 2f\n add $3,%%rax\n jmp 3f\n2: add $5,%%rdx\n3: test $2,%%cl\n jz 4f\n add $7,%%rax\n4:\n", "")

// Near each other, in one page and in two; then one at a time in two.
#define GROUP "mov (%%rsi),%%rax\n add 24(%%rsi),%%rax\n add 40(%%rsi),%%rax\n mov %%rax,16(%%rsi)\n mov %%rax,48(%%rsi)\n"
LOOP(within, "lea 512(%1),%%rsi\n", GROUP, "")
LOOP(straddling, "lea 4064(%1),%%rsi\n", GROUP, "")
LOOP(across_load, "lea 4091(%1),%%rsi\n", "mov (%%rsi),%%rax\n", "")
LOOP(across_load16, "lea 4091(%1),%%rsi\n", "movups (%%rsi),%%xmm0\n", "")
LOOP(across_store, "lea 4091(%1),%%rsi\n", "mov %%rax,(%%rsi)\n", "")
LOOP(across_store16, "lea 4091(%1),%%rsi\n", "movups %%xmm0,(%%rsi)\n", "")

static void run(const char *name, void (*loop)(long))
{
    double best = 1e9;
    loop(ROUNDS / 10);
    for (int i = 0; i < 5; i++) {
        double began = now();
        loop(ROUNDS);
        double took = now() - began;
        best = took < best ? took : best;
    }
    printf("LOOP %s %.3f\n", name, best * 1e9 / ROUNDS);
}

int main(void)
{
    run("nothing", nothing);
    run("registers-low", low_registers);
    run("registers-high", high_registers);
    run("wide-low", wide_low);
    run("wide-high", wide_high);
    run("fp-chain", fp_chain);
    run("fp-chain-of-4", fp_chain_of_4);
    run("loads", loads);
    run("chase", chase);
    run("called", called);
    run("inlined", inlined);
    run("branches", branches);
    run("within", within);
    run("straddling", straddling);
    run("across-load", across_load);
    run("across-load16", across_load16);
    run("across-store", across_store);
    run("across-store16", across_store16);
    printf("LOOP end\n");
    return 0;
}
