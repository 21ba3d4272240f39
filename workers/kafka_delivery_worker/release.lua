-- Give back what only the leased transport looks at, to a list of Celery's own, some at a time, if the caller's lock still
-- holds.
-- KEYS: lock, where it lies, list, and for what was put aside the set of what waits, which then forgets an empty one
-- ARGV: token of the lock, how many, and that set's member
-- Reply: how many were moved; -1 if the lock is another's, or nobody's
--
-- Of a delayed set the soonest go to the end of the list. What was put aside goes to its front, in order: it is older
-- than what is there.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
local many = tonumber(ARGV[2])
if KEYS[4] then
  redis.call('SREM', KEYS[4], '')  -- needs no memory, so that a full Redis lets pass what follows
  local moved = 0
  while moved < many and redis.call('LMOVE', KEYS[2], KEYS[3], 'LEFT', 'RIGHT') do moved = moved + 1 end
  if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SREM', KEYS[4], ARGV[3]) end
  return moved
end
local soonest = redis.call('ZRANGE', KEYS[2], 0, many - 1)
redis.call('ZREM', KEYS[2], '')  -- the same
for _, item in ipairs(soonest) do
  redis.call('LPUSH', KEYS[3], item)
  redis.call('ZREM', KEYS[2], item)
end
return #soonest
