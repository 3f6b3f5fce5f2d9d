-- Check one request against all its limits, and count it under all of them or none (`Counters.check`).
-- KEYS: holders, answers, then for each check the keys that it needs, of its window, its block and its tunnels.
-- request: holder, number, again, deadline, checks. A check: strategy, amount, window, max_tunnels, block_for, enforced.
-- Returns {0, now, and for each check what is exceeded and the time to wait}; {1, now} for a holder that is not current;
-- {2, now} after the deadline, when nothing was counted.
local holder, number, again, deadline, checks = unpack(request, 1, 5)
local slot = number % 1024
local id = string.format("%.0f", number)

if not is_current(holder) then
  return cmsgpack.pack({1, now})
end
if again then
  local remembered = redis.call("HGET", KEYS[2], slot)
  if remembered and string.sub(remembered, 1, #id + 1) == id .. "|" then
    return string.sub(remembered, #id + 2)
  end
end
if now > deadline then
  return cmsgpack.pack({2, now})
end
fresh[holder] = true

-- A time to live, with a second more: what a window holds decides, never the moment at which a key expires.
local function to_ttl(microseconds)
  return math.ceil(microseconds / 1000) + 1000
end

local windows = {}

-- A window begins with the first request after the end of the last one. Value: end:count.
windows.fixed = {
  read = function(key, amount, window)
    local ends, count = string.match(redis.call("GET", key) or "", "^(%d+):(%d+)$")
    ends, count = math.min(tonumber(ends or 0), now + window), tonumber(count or 0)
    if ends <= now then
      ends, count = now + window, 0
    end
    return count >= amount, ends - now, {ends, count}
  end,
  count = function(key, window, state)
    redis.call("SET", key, string.format("%.0f:%.0f", state[1], state[2] + 1), "PX", to_ttl(state[1] - now))
  end,
}

-- At most this many in any period as long as the window. A list of times, oldest first.
windows.moving = {
  read = function(key, amount, window)
    local newest = tonumber(redis.call("LINDEX", key, -1) or -window)
    if newest + window <= now then
      redis.call("DEL", key)
      return false, 0, nil
    end
    local oldest = tonumber(redis.call("LINDEX", key, 0))
    while oldest + window <= now do
      redis.call("LPOP", key)
      oldest = tonumber(redis.call("LINDEX", key, 0))
    end
    return redis.call("LLEN", key) >= amount, math.min(oldest + window - now, window), nil
  end,
  count = function(key, window, _)
    redis.call("RPUSH", key, string.format("%.0f", now))
    redis.call("PEXPIRE", key, to_ttl(window))
  end,
}

-- The window before counts by its share of the last `window`. Value: end of the next window:count:count before.
windows.sliding = {
  read = function(key, amount, window)
    local ends = now - now % window + window
    local until_, current, previous = string.match(redis.call("GET", key) or "", "^(%d+):(%d+):(%d+)$")
    until_, current, previous = tonumber(until_ or 0), tonumber(current or 0), tonumber(previous or 0)
    if until_ == ends then
      current, previous = 0, current
    elseif until_ < ends then
      current, previous = 0, 0
    end
    local left = ends - now
    local exceeded = previous * left / window + current >= amount
    local wait = 0
    if exceeded then
      -- It admits only after the computed moment, not at it.
      wait = current >= amount and left + 1 or math.floor(left - (amount - current) * window / previous) + 1
    end
    return exceeded, wait, {ends + window, current, previous}
  end,
  count = function(key, window, state)
    local value = string.format("%.0f:%.0f:%.0f", state[1], state[2] + 1, state[3])
    redis.call("SET", key, value, "PX", to_ttl(state[1] - now))
  end,
}

local answer = {0, now}
local counting, refused = {}, false
local next_key = 3

local function take_key()
  next_key = next_key + 1
  return KEYS[next_key - 1]
end

for index, check in ipairs(checks) do
  local strategy, amount, window, max_tunnels, block_for, enforced = unpack(check, 1, 6)
  local window_key = amount > 0 and take_key()
  local block_key = block_for > 0 and take_key()
  local tunnels_key = max_tunnels > 0 and take_key()
  local exceeded, wait, state = 0, 0, nil
  if block_key then
    local left = tonumber(redis.call("GET", block_key) or 0) - now
    if left > 0 then
      exceeded, wait = 3, left
    end
  end
  if exceeded == 0 and window_key then
    local over, left
    over, left, state = windows[strategy].read(window_key, amount, window)
    if over then
      exceeded, wait = 1, math.max(left, block_for)
      if block_key then
        redis.call("SET", block_key, string.format("%.0f", now + block_for), "PX", to_ttl(block_for))
      end
    end
  end
  if exceeded == 0 and tunnels_key and count_tunnels(tunnels_key) >= max_tunnels then
    exceeded = 2
  end
  answer[2 * index + 1] = exceeded
  answer[2 * index + 2] = wait
  if exceeded == 0 then
    counting[#counting + 1] = {strategy, window, window_key, tunnels_key, state}
  elseif enforced then
    refused = true
  end
end

local packed = cmsgpack.pack(answer)
if not refused then
  for _, one in ipairs(counting) do
    local strategy, window, window_key, tunnels_key, state = unpack(one, 1, 5)
    if window_key then
      windows[strategy].count(window_key, window, state)
    end
    if tunnels_key then
      redis.call("HINCRBY", tunnels_key, holder, 1)
      redis.call("PEXPIRE", tunnels_key, TUNNELS_TTL)
    end
  end
  redis.call("HSET", KEYS[2], slot, id .. "|" .. packed)
end
return packed
