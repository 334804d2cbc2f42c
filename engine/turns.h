/* Who has the device between steps: the queue behind engine_turn_* of engine.h.
 *
 * All of it is under the engine's lock. A borrower waits in line; the engine's thread lends to the first and waits until
 * the device is back. */
#ifndef ENGINE_TURNS_H
#define ENGINE_TURNS_H

#include <pthread.h>
#include <stdbool.h>

struct engine_turn {
    struct engine *engine;
    struct engine_turn *next; /* in line */
    pthread_cond_t granted;
    bool holding;
};

struct turns {
    struct engine_turn *first, **last; /* in line */
    struct engine_turn *holder;
    pthread_cond_t returned;
    double end; /* when the holder's turn is over, if anybody else wants the device; CLOCK_MONOTONIC */
};

void turns_init(struct turns *t);
void turns_destroy(struct turns *t); /* nobody is in line */

void turns_join(struct turns *t, struct engine_turn *turn);
void turns_leave(struct turns *t, struct engine_turn *turn); /* out of line, wherever it stands */
/* Lends to the first in line, if there is one, and waits until the device is back. */
void turns_lend(struct turns *t, pthread_mutex_t *lock, double end);
void turns_return(struct turns *t); /* the holder's */
void turns_wake(struct turns *t);   /* everybody in line looks again at why they wait */

#endif
