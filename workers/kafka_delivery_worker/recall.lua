-- Look through a part of a delayed set for messages that were put off by a clock that was ahead, and let their pause end.
-- A message that waits for its own time stays: that time is absolute.
--
-- KEYS: delayed set; ARGV: where to begin ("0" at first), the longest pause (ms)
-- Reply: where to go on, "0" at the end; messages recalled
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREM', KEYS[1], '')  -- needs no memory, so that a full Redis lets pass what follows
local reply, recalled = redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', 100), 0
for i = 1, #reply[2], 2 do
  local at = tonumber(reply[2][i + 1])
  -- Half a millisecond says that claim.lua has put it off.
  if at % 1 == 0.5 and at > now + tonumber(ARGV[2]) + 1 then
    redis.call('ZADD', KEYS[1], 'XX', now + 0.5, reply[2][i])
    recalled = recalled + 1
  end
end
return {reply[1], recalled}
