#include "engine/turns.h"

#include <stddef.h>

void turns_init(struct turns *t)
{
    *t = (struct turns){.last = &t->first};
    pthread_cond_init(&t->returned, NULL);
}

void turns_destroy(struct turns *t) { pthread_cond_destroy(&t->returned); }

void turns_join(struct turns *t, struct engine_turn *turn)
{
    turn->next = NULL;
    *t->last = turn;
    t->last = &turn->next;
}

void turns_leave(struct turns *t, struct engine_turn *turn)
{
    struct engine_turn **at = &t->first;
    while (*at && *at != turn) at = &(*at)->next;
    if (!*at) return;
    *at = turn->next;
    if (!*at) t->last = at;
}

void turns_lend(struct turns *t, pthread_mutex_t *lock, double end)
{
    struct engine_turn *turn = t->first;
    if (!turn) return;
    turns_leave(t, turn);
    turn->holding = true;
    t->holder = turn;
    t->end = end;
    pthread_cond_signal(&turn->granted);
    while (t->holder) pthread_cond_wait(&t->returned, lock);
}

void turns_return(struct turns *t)
{
    t->holder->holding = false;
    t->holder = NULL;
    pthread_cond_signal(&t->returned);
}

void turns_wake(struct turns *t)
{
    for (struct engine_turn *turn = t->first; turn; turn = turn->next) pthread_cond_signal(&turn->granted);
}
